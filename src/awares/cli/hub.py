"""Publishing on a model hub: the trained policy and the curated rows, each with a card from this run's tables."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import HfApi, ModelCard, ModelCardData

from awares.config import Params
from awares.data import sources
from awares.engine.rows import load_rows
from awares.errors import AwaresError, AwaresValueError
from awares.study import publish

APACHE = ("data/base", "Qwen/Qwen2.5-VL-7B-Instruct")  # base models under Apache-2.0


def policy_folder(params: Params) -> Path:
    """The merged model, its adapters and a card with Table 1's accuracies; AwaresError if a stage has not run."""
    config = publish.require(params.run_dir("grpo") / "merged" / "config.json", "grpo")
    table = publish.require(params.run_dir("evaluation") / "tables" / "table1_main.csv", "evaluation")
    folder = publish.clear(params.run_dir(".push") / "policy")
    publish.copy_adapters(params, folder / "adapters", params.base.model)
    _link(config.parent.iterdir(), folder)
    scores = [row for row in pd.read_csv(table).itertuples() if row.system == "awares"]
    about = {"apache": APACHE, "of_hub": isinstance(params.model_path(), str), "scores": scores}
    _write_card(folder, "model.md", params=params, **about)
    return folder


def dataset_folder(params: Params, images: bool = False) -> Path:
    """A Parquet file per split (with ``images`` or ids alone), raw labels, a card; AwaresError if none were curated."""
    if params.curation.released:
        raise AwaresValueError("curation.released: these rows are published already, and were not curated here")
    curated = {split: params.run_dir("curation") / split for split in ("train", "validation")}
    for path in curated.values():
        publish.require(path / "dataset" / "state.json", "curation")
    folder, counts = publish.clear(params.run_dir(".push") / "dataset"), []
    (folder / "data").mkdir()
    for split, path in curated.items():
        rows = load_rows(path / "dataset")
        counts.append((split, len(rows), rows["label"][:].count("HR")))
        _link(path.glob("*.jsonl"), folder / "raw" / split)
        (rows if images else rows.remove_columns("image")).to_parquet(folder / "data" / f"{split}.parquet")
    declared = sources.read_sources(params, "training") if params.data.origin == "hub" else {}
    origins = {name: ("generated", "Apache-2.0") for name in params.data.sources}
    origins |= {name: (one.hub, one.licence) for name, one in declared.items() if name in origins}
    own = {name: ("rows of the uploader's own", "not stated") for name in origins if name.endswith(".jsonl")}
    listed = [(Path(name).stem if name in own else name, *about) for name, about in (origins | own).items()]
    generated = all(origin == "generated" for _, origin, _ in listed)
    _write_card(folder, "dataset.md", params=params, counts=counts, images=images, sources=listed, generated=generated)
    return folder


def _link(files: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in filter(Path.is_file, files):
        (folder / file.name).symlink_to(file.resolve())  # weights are large


def _write_card(folder: Path, template: str, **values: Any) -> None:
    path = str(Path(__file__).with_name("cards") / template)
    ModelCard.from_template(ModelCardData(), path, **values).save(folder / "README.md")


def upload(folder: Path, repo: str, kind: str, private: bool = True) -> str:
    """Upload ``folder`` to ``repo`` (OWNER/NAME), a model or dataset; the commit's address. AwaresError if it fails."""
    api = HfApi(token=os.environ.get("HF_TOKEN"))
    try:
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo, repo_type=kind, commit_message="From awares"))
    except Exception as error:  # many types, from the hub or the network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AwaresError(f"push to {repo} failed: {reason}. Set HF_TOKEN to a write token") from error
