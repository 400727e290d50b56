"""Publishing on a model hub: the trained policy and the curated rows, each with a card whose numbers come from this run's tables.

A folder is laid out in ``runs/<profile>/.push`` and then uploaded whole; a dry run stops before the upload. Images of other people's datasets are
left out unless asked for: their licences stand on the card.
"""

import json
import os
import shutil
from pathlib import Path

import datasets
import pandas as pd
from huggingface_hub import DatasetCardData, EvalResult, HfApi, ModelCardData

from awares.config import Params
from awares.data import rows as data
from awares.data import sources
from awares.errors import AwaresError, AwaresFileError, AwaresValueError

PAPER = "https://arxiv.org/abs/2603.16932"
SPLITS = ("train", "validation")
EMBEDDED = "data/base"
APACHE = (
    EMBEDDED,
    "Qwen/Qwen2.5-VL-7B-Instruct",
)  # base models under Apache-2.0; of another the licence is for who uploads to name


def policy_folder(params: Params) -> Path:
    """The policy ready to upload: the merged model, the adapters that make it in ``adapters/``, a model card with the accuracies of Table 1.

    Of the adapters the cold start's names the base model, GRPO's the cold start's: nothing that stays behind. AwaresError where a
    training or the evaluation has not run.
    """
    made_for = {"sft": params.base.model, "grpo": "../sft"}
    table = params.run_dir("evaluation") / "tables" / "table1_main.csv"
    needed = {params.run_dir(stage) / "adapter" / "adapter_config.json": stage for stage in made_for}
    needed |= {params.run_dir("grpo") / "merged" / "config.json": "grpo", table: "evaluation"}
    for path, stage in needed.items():
        if not path.is_file():
            raise AwaresFileError(f"{path}: not there yet; run `dvc repro {stage}`")
    folder = _fresh(params, "policy")
    for file in filter(Path.is_file, (params.run_dir("grpo") / "merged").iterdir()):
        _link(file, folder / file.name)
    for stage, base in made_for.items():
        adapter, into = params.run_dir(stage) / "adapter", folder / "adapters" / stage
        _link(adapter / "adapter_model.safetensors", into / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base
        (into / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_model_card(params, pd.read_csv(table)), encoding="utf-8")
    return folder


def _model_card(params: Params, table: pd.DataFrame) -> str:
    mine = table[table.system == "awares"]
    results = [
        EvalResult(
            task_type="image-text-to-text", dataset_type=f"awares-{params.profile}", dataset_name=f"{row.benchmark} ({params.profile})",
            metric_type="accuracy", metric_value=round(float(row.accuracy), 2),
        )
        for row in mine.itertuples()
    ]  # fmt: skip
    about = ModelCardData(
        license="apache-2.0" if params.base.model in APACHE else "other", library_name="transformers",
        pipeline_tag="image-text-to-text", tags=["awares", "efficient-vlm"],
        base_model=params.base.model if isinstance(params.model_path(), str) else None,
        model_name=f"awares-{params.profile}", eval_results=results,
    )  # fmt: skip
    base = "the embedded base model of the awares repository" if params.base.model == EMBEDDED else params.base.model
    kind = "generated rows" if params.data.origin != "hub" else "the published benchmarks"
    lines = [
        f"| {row.benchmark} | {row.accuracy:.2f} ({row.accuracy_low:.2f}-{row.accuracy_high:.2f}) | {row.rtr:.2f} | {row.n} |"
        for row in mine.itertuples()
    ]
    text = f"""
# AwaRes policy, profile `{params.profile}`

{base}, trained to see an image at half resolution and to call for the crops that it needs ([AwaRes]({PAPER}): cold start, then
multi-turn GRPO), by the pipeline of the awares repository, training seed {params.seed}. The weights here are merged; `adapters/` holds the
LoRA adapters that make them: `sft`, the cold start's over the base model, and `grpo`, over the cold-started one.

Accuracy in percent with its {params.evaluation.level:.0%} interval, retained visual tokens (RTR), on {kind}:

| benchmark | accuracy | RTR | rows |
|---|---|---:|---:|
{chr(10).join(lines)}

```python
from awares import AwaRes

done = AwaRes.from_pretrained("this folder").ask("page.png", "what is the total?")
```
"""
    return f"---\n{about.to_yaml()}\n---\n{text}"


def dataset_folder(params: Params, images: bool = False) -> Path:
    """The curated rows ready to upload: a Parquet file a split, raw labels beside them, a card with the sources' licences.

    ``images``: with the pictures; without them a row is found again by its id. AwaresError where curation has not run, and for released
    rows: they are others' work.
    """
    if params.curation.released:
        raise AwaresValueError("curation.released: these rows are published already, and were not curated here")
    curated = params.run_dir("curation")
    for split in SPLITS:
        if not (curated / split / "dataset").is_dir():
            raise AwaresFileError(f"{curated / split}: not there yet; run `dvc repro curation`")
    folder = _fresh(params, "dataset")
    rows = {split: data.load_rows(curated / split / "dataset") for split in SPLITS}
    for split, part in rows.items():
        (folder / "data").mkdir(exist_ok=True)
        kept = part if images else part.remove_columns("image")
        kept.to_parquet(folder / "data" / f"{split}.parquet")
        for file in sorted((curated / split).glob("*.jsonl")):
            _link(file, folder / "raw" / split / file.name)
    (folder / "README.md").write_text(_dataset_card(params, rows, images), encoding="utf-8")
    return folder


def _dataset_card(params: Params, rows: dict[str, datasets.Dataset], images: bool) -> str:
    real = params.data.origin == "hub"
    own = [name for name in params.data.sources if name.endswith(".jsonl")]
    about = DatasetCardData(
        license="other" if real or own else "apache-2.0",
        task_categories=["visual-question-answering"], tags=["awares"], pretty_name="AwaRes, curated",
        configs=[{"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}.parquet"} for s in SPLITS]}],
    )  # fmt: skip
    declared = sources.read_sources(params, "training") if real else {}
    terms = [
        f"| {name} | {declared[name].hub} | {declared[name].licence} |"
        if name in declared
        else f"| {Path(name).stem} | rows of the uploader's own | not stated |"
        if name in own
        else f"| {name} | generated | Apache-2.0 |"
        for name in params.data.sources
    ]
    counts = [
        f"| {split} | {len(part)} | {sum(label == 'HR' for label in part['label'])} |" for split, part in rows.items()
    ]
    section = params.curation
    text = f"""
# AwaRes, curated rows, profile `{params.profile}`

Questions about images, each labelled without annotators ([AwaRes]({PAPER}) §3.2): LR where the half-resolution view is enough, HR
where it is not, and which crops an HR row needs. Judge: `{section.judge}`; oracle: `{section.oracle}`. `raw/` holds both base answers, every
judge's verdict and the oracle's boxes, a line a row.
{"" if images else "The images are not part of it: an id names the row of its source."}

| split | rows | HR |
|---|---:|---:|
{chr(10).join(counts)}

The rows come from these sources, and stand under their terms:

| source | dataset | licence |
|---|---|---|
{chr(10).join(terms)}
"""
    return f"---\n{about.to_yaml()}\n---\n{text}"


def push(folder: Path, repo: str, kind: str, private: bool = True) -> str:
    """Upload ``folder`` to ``repo`` (OWNER/NAME), a model or a dataset, made if need be; the address of the commit. The token is HF_TOKEN's."""
    api = HfApi(token=os.environ.get("HF_TOKEN"))
    try:
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        done = api.upload_folder(
            folder_path=str(folder), repo_id=repo, repo_type=kind, commit_message="Upload from awares"
        )
    except Exception as error:  # whatever the hub or the network does
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AwaresError(
            f"push to {repo} failed: {reason}. A write token goes into HF_TOKEN; {folder} is ready as it is"
        ) from error
    return str(done)


def contents(folder: Path) -> list[tuple[str, int]]:
    """(path, bytes) of every file that would be uploaded."""
    return [
        (file.relative_to(folder).as_posix(), file.stat().st_size)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]


def _fresh(params: Params, name: str) -> Path:
    folder = params.path(params.paths.runs) / params.profile / ".push" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _link(file: Path, into: Path) -> None:
    """A hard link where the disk allows one: weights are large."""
    into.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.resolve(), into)
    except OSError:
        shutil.copyfile(file, into)
