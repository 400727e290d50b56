"""Publishing on a model hub: the trained policy and the curated rows, each with a card from this run's tables.

A folder is prepared in ``runs/<profile>/.push`` and then uploaded whole. Images of other people's datasets are left out
unless requested; their licences are on the card.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, HfApi, ModelCard, ModelCardData

from awares.config import Params
from awares.data import sources
from awares.engine.rows import load_rows
from awares.errors import AwaresError, AwaresFileError, AwaresValueError

CARDS = Path(__file__).with_name("cards")
PAPER = "https://arxiv.org/abs/2603.16932"
SPLITS = ("train", "validation")
EMBEDDED = "data/base"
APACHE = (EMBEDDED, "Qwen/Qwen2.5-VL-7B-Instruct")  # base models under Apache-2.0


def policy_folder(params: Params) -> Path:
    """The policy ready to upload: the merged model, its adapters in ``adapters/``, a card with Table 1's accuracies.

    AwaresError where a training or the evaluation has not run.
    """
    bases = {"sft": params.base.model, "grpo": "../sft"}  # of the adapters: nothing that stays behind
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
    _model_card(params, list(scores[scores.system == "awares"].itertuples())).save(folder / "README.md")
    return folder


def _model_card(params: Params, scores: list[Any]) -> ModelCard:
    base, profile = params.base.model, params.profile
    task: dict[str, Any] = {"task_type": "image-text-to-text", "dataset_type": f"awares-{profile}"}
    task["metric_type"] = "accuracy"
    names = [f"{row.benchmark} ({profile})" for row in scores]
    values = [round(row.accuracy, 2) for row in scores]
    about = ModelCardData(model_name=f"awares-{profile}", license="apache-2.0" if base in APACHE else "other")
    about.library_name, about.pipeline_tag, about.tags = "transformers", task["task_type"], ["awares", "efficient-vlm"]
    about.base_model = base if isinstance(params.model_path(), str) else None
    about.eval_results = [
        EvalResult(**task, dataset_name=name, metric_value=value) for name, value in zip(names, values, strict=True)
    ]
    shown: dict[str, Any] = {"profile": profile, "paper": PAPER, "seed": params.seed, "scores": scores}
    shown["base"] = "The embedded base model of awares" if base == EMBEDDED else base
    shown["kind"] = "the published benchmarks" if params.data.origin == "hub" else "generated rows"
    return ModelCard.from_template(about, str(CARDS / "model.md"), level=f"{params.evaluation.level:.0%}", **shown)


def dataset_folder(params: Params, images: bool = False) -> Path:
    """The curated rows ready to upload: a Parquet file per split, raw labels, a card with the sources' licences.

    ``images``: with the pictures; without them a row is found by its id. AwaresError where curation has not run, and
    for released rows, which are others' work.
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
    _dataset_card(params, counts, images).save(folder / "README.md")
    return folder


def _dataset_card(params: Params, counts: list[tuple[str, int, int]], images: bool) -> DatasetCard:
    declared = sources.read_sources(params, "training") if params.data.origin == "hub" else {}
    origins = [(name, "generated", "Apache-2.0") for name in params.data.sources]
    for place, name in enumerate(params.data.sources):
        if name in declared:
            origins[place] = (name, declared[name].hub, declared[name].licence)
        elif name.endswith(".jsonl"):
            origins[place] = (Path(name).stem, "rows of the uploader's own", "not stated")
    generated = all(origin == "generated" for _, origin, _ in origins)
    about = DatasetCardData(pretty_name="AwaRes, curated", license="apache-2.0" if generated else "other")
    about["task_categories"], about["tags"] = ["visual-question-answering"], ["awares"]
    files = [{"split": split, "path": f"data/{split}.parquet"} for split in SPLITS]
    about["configs"] = [{"config_name": "default", "data_files": files}]
    shown: dict[str, Any] = {"profile": params.profile, "paper": PAPER, "images": images, "counts": counts}
    shown |= {"sources": origins, "judge": params.curation.judge, "oracle": params.curation.oracle}
    return DatasetCard.from_template(about, str(CARDS / "dataset.md"), **shown)


def push(folder: Path, repo: str, kind: str, private: bool = True) -> str:
    """Upload ``folder`` to ``repo`` (OWNER/NAME), a model or a dataset, created if need be; the address of the commit.

    The token is HF_TOKEN's. AwaresError for whatever the hub or the network refuses.
    """
    api = HfApi(token=os.environ.get("HF_TOKEN"))
    try:
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo, repo_type=kind, commit_message="From awares"))
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
