"""Publishing on a model hub: the trained policy and the curated rows, each with a card from this run's tables.

A folder is prepared in ``runs/<profile>/.push`` and then uploaded whole. Images of other people's datasets are left out unless
requested; their licences are on the card.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import DatasetCardData, EvalResult, HfApi, ModelCardData, RepoCard

from awares.config import Params
from awares.data import sources
from awares.engine.rows import load_rows
from awares.errors import AwaresError, AwaresFileError, AwaresValueError

PAPER = "https://arxiv.org/abs/2603.16932"
SPLITS = ("train", "validation")
EMBEDDED = "data/base"
APACHE = (EMBEDDED, "Qwen/Qwen2.5-VL-7B-Instruct")  # base models under Apache-2.0

MODEL_CARD = """
# AwaRes policy, profile `{profile}`

{base}, trained to see an image at half resolution and to call for the crops that it needs ([AwaRes]({paper}): SFT, then multi-turn
GRPO), by the pipeline of the awares repository, training seed {seed}. The weights here are merged; `adapters/` has the LoRA adapters:
`sft` for the base model, and `grpo` for the model after SFT.

Accuracy in percent with its {level:.0%} interval, retained visual tokens (RTR), on {rows}:

{table}

```python
from awares import AwaRes

done = AwaRes.from_pretrained("this folder").ask("page.png", "what is the total?")
```
"""
DATASET_CARD = """
# AwaRes, curated rows, profile `{profile}`

Questions about images, each labelled without annotators ([AwaRes]({paper}) §3.2): LR where the half-resolution view is enough, HR
where it is not, and the crops that an HR row needs. Judge: `{judge}`; oracle: `{oracle}`. `raw/` has both base answers, every judge's
verdict and the oracle's boxes, one line per row.
{images}

{counts}

The rows come from these sources, under their licences:

{sources}
"""


def policy_folder(params: Params) -> Path:
    """The policy ready to upload: the merged model, its adapters in ``adapters/``, a model card with the accuracies of Table 1.

    AwaresError where a training or the evaluation has not run.
    """
    bases = {"sft": params.base.model, "grpo": "../sft"}  # nothing that stays behind
    table = params.run_dir("evaluation") / "tables" / "table1_main.csv"
    needed = {params.run_dir(stage) / "adapter" / "adapter_config.json": stage for stage in bases}
    needed |= {params.run_dir("grpo") / "merged" / "config.json": "grpo", table: "evaluation"}
    for path, stage in needed.items():
        _require(path, stage)
    folder = _fresh(params, "policy")
    for file in filter(Path.is_file, (params.run_dir("grpo") / "merged").iterdir()):
        _link(file, folder / file.name)
    for stage, base in bases.items():
        adapter, into = params.run_dir(stage) / "adapter", folder / "adapters" / stage
        _link(adapter / "adapter_model.safetensors", into / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
        (into / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    scores = pd.read_csv(table)
    _save_card(folder, *_model_card(params, scores[scores.system == "awares"]))
    return folder


def _model_card(params: Params, scores: pd.DataFrame) -> tuple[ModelCardData, str]:
    task: dict[str, Any] = {
        "task_type": "image-text-to-text",
        "dataset_type": f"awares-{params.profile}",
        "metric_type": "accuracy",
    }
    results = [
        EvalResult(**task, dataset_name=f"{row.benchmark} ({params.profile})", metric_value=round(row.accuracy, 2))
        for row in scores.itertuples()
    ]
    card = ModelCardData(
        license="apache-2.0" if params.base.model in APACHE else "other",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["awares", "efficient-vlm"],
        base_model=params.base.model if isinstance(params.model_path(), str) else None,
        model_name=f"awares-{params.profile}",
        eval_results=results,
    )
    lines = [
        (one.benchmark, f"{one.accuracy:.2f} ({one.accuracy_low:.2f}-{one.accuracy_high:.2f})", f"{one.rtr:.2f}", one.n)
        for one in scores.itertuples()
    ]
    text = MODEL_CARD.format(
        profile=params.profile,
        paper=PAPER,
        base="The embedded base model of awares" if params.base.model == EMBEDDED else params.base.model,
        seed=params.seed,
        level=params.evaluation.level,
        rows="generated rows" if params.data.origin != "hub" else "the published benchmarks",
        table=_table(("benchmark", "accuracy", "RTR", "rows"), lines),
    )
    return card, text


def dataset_folder(params: Params, images: bool = False) -> Path:
    """The curated rows ready to upload: a Parquet file per split, raw labels, a card with the sources' licences.

    ``images``: with the pictures; without them a row is found by its id. AwaresError where curation has not run, and for released
    rows, which are others' work.
    """
    if params.curation.released:
        raise AwaresValueError("curation.released: these rows are published already, and were not curated here")
    curated = params.run_dir("curation")
    for split in SPLITS:
        _require(curated / split / "dataset", "curation")
    folder, counts = _fresh(params, "dataset"), []
    (folder / "data").mkdir()
    for split in SPLITS:
        rows = load_rows(curated / split / "dataset")
        counts.append((split, len(rows), sum(label == "HR" for label in rows["label"])))
        (rows if images else rows.remove_columns("image")).to_parquet(folder / "data" / f"{split}.parquet")
        for file in sorted((curated / split).glob("*.jsonl")):
            _link(file, folder / "raw" / split / file.name)
    real = params.data.origin == "hub"
    declared = sources.read_sources(params, "training") if real else {}
    origins = [
        (name, declared[name].hub, declared[name].licence)
        if name in declared
        else (Path(name).stem, "rows of the uploader's own", "not stated")
        if name.endswith(".jsonl")
        else (name, "generated", "Apache-2.0")
        for name in params.data.sources
    ]
    files = [{"split": split, "path": f"data/{split}.parquet"} for split in SPLITS]
    card = DatasetCardData(
        license="apache-2.0" if all(licence == "Apache-2.0" for _, _, licence in origins) and not real else "other",
        task_categories=["visual-question-answering"],
        tags=["awares"],
        pretty_name="AwaRes, curated",
        configs=[{"config_name": "default", "data_files": files}],
    )
    text = DATASET_CARD.format(
        profile=params.profile,
        paper=PAPER,
        judge=params.curation.judge,
        oracle=params.curation.oracle,
        images="" if images else "The images are not part of it: an id names the row of its source.",
        counts=_table(("split", "rows", "HR"), counts),
        sources=_table(("source", "dataset", "licence"), origins),
    )
    _save_card(folder, card, text)
    return folder


def push(folder: Path, repo: str, kind: str, private: bool = True) -> str:
    """Upload ``folder`` to ``repo`` (OWNER/NAME), a model or a dataset, created if need be; the address of the commit.

    The token is HF_TOKEN's. AwaresError for whatever the hub or the network refuses.
    """
    api = HfApi(token=os.environ.get("HF_TOKEN"))
    try:
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        message = "Upload from awares"
        return str(api.upload_folder(folder_path=folder, repo_id=repo, repo_type=kind, commit_message=message))
    except Exception as error:  # whatever the hub or the network does
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"push to {repo} failed: {reason}. A write token goes into HF_TOKEN; {folder} is ready as it is"
        raise AwaresError(message) from error


def contents(folder: Path) -> list[tuple[str, int]]:
    """(path, bytes) of every file that would be uploaded."""
    files = filter(Path.is_file, sorted(folder.rglob("*")))
    return [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files]


def _require(path: Path, stage: str) -> None:
    if not path.exists():
        raise AwaresFileError(f"{path}: not there yet; run `dvc repro {stage}`")


def _table(columns: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [columns, ["---"] * len(list(columns)), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _save_card(folder: Path, card: ModelCardData | DatasetCardData, text: str) -> None:
    RepoCard(f"---\n{card.to_yaml()}\n---\n{text}").save(folder / "README.md")


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
