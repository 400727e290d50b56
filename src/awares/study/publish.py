"""Executed notebooks -> byte-stable copies in reports/<profile>/; the trained policy -> a model hub.

An executed notebook differs on every run (ids, timings, progress bars). The published copy keeps the results and drops
the rest, so that two runs with the same numbers give the same bytes. ``python -m awares.study.publish PROFILE [STAGE]``
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from huggingface_hub import HfApi, ModelCard, ModelCardData

from awares.config import Params, load_params
from awares.errors import AwaresError, AwaresFileError, AwaresValueError

_MAIN_LINE = "00_data 01_curation 02_crop_distribution 03_sft 04_grpo 05_evaluation 05_operating_curve".split()
STAGES = {name: name[3:] for name in _MAIN_LINE} | {"report": "report"}  # notebook -> stage
PAGES = {"base_model": "00_base_model", "seeds": "09_seeds", "latency": "07_latency",
         "ablations": "06_ablations_summary", "comparison": "11_comparison",
         "shift": "12_shift", "plus": "13_plus"}  # fmt: skip


def publish(params: Params, stage: str = "report") -> list[Path]:
    """Publish the executed notebooks of ``stage``; returns the files written.

    report: the main line (STAGES), the explorer's data. A stage of PAGES: in reports/<profile>/<stage> its notebook and
    that of every variant or system. policy: the trained adapters, in data/policy. Raises AwaresError that names the
    first missing file, before anything is written.
    """
    if stage == "policy":
        return copy_adapters(params, params.path("data/policy"), "../../base")
    if stage not in ("report", *PAGES):
        raise AwaresValueError(f"unknown stage {stage!r}: publish {', '.join(('report', *PAGES, 'policy'))}")
    pages = {PAGES[stage]: stage} if stage in PAGES else STAGES
    runs = {name: params.run_dir(one) for name, one in pages.items()}
    if params.curation.released and stage == "report":
        runs = {name.replace("01_curation", "01_released"): run for name, run in runs.items()}
    groups = {"ablations": ("curation", "sft", "grpo", "systems"), "plus": ("beyond", "plus")}
    if stage in groups:
        variants = params.variants(*groups[stage])
        runs |= {f"06_{name}": replace(params, variant=name).run_dir("evaluation") for name in variants}
    elif stage == "comparison":
        names = *params.comparison.systems, *params.comparison.own
        runs |= {f"10_{name}": params.run_dir("systems") / name for name in names}
    sources = {name: require(run / "notebook.ipynb", stage) for name, run in runs.items()}
    folder, files = params.report_dir() / ("" if stage == "report" else stage), list[Path]()
    if stage == "report":
        explored = require(runs["05_operating_curve"] / "explorer/rows.js", "operating_curve")
        files.append(Path(shutil.copy(explored, clear(folder / "explorer"))))
    notebooks = clear(folder / "notebooks")
    for name, source in sources.items():
        files.append(notebooks / f"{name}.ipynb")
        nbformat.write(stable_copy(nbformat.read(source, as_version=4), params.root), files[-1])
    return files


def copy_adapters(params: Params, into: Path, base: str) -> list[Path]:
    """Copy the adapters of SFT and GRPO; each names what it was trained on: ``base``, or the other one (``../sft``)."""
    names = {"sft": base, "grpo": "../sft"}
    files = [require(params.run_dir(stage) / "adapter" / "adapter_config.json", stage) for stage in names]
    for file, (stage, trained_on) in zip(files, names.items(), strict=True):
        folder = clear(into / stage)
        config = json.loads(file.read_text()) | {"base_model_name_or_path": trained_on}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.copy(file.with_name("adapter_model.safetensors"), folder)
    return sorted(into.glob("*/*"))


def hub_folder(params: Params) -> Path:
    """For the hub: merged model, adapters, a card with Table 1's accuracies; AwaresError if a stage has not run."""
    config = require(params.run_dir("grpo") / "merged" / "config.json", "grpo")
    table = require(params.run_dir("evaluation") / "tables" / "table1_main.csv", "evaluation")
    folder = clear(params.run_dir(".push") / "policy")
    copy_adapters(params, folder / "adapters", params.base.model)
    for file in filter(Path.is_file, config.parent.iterdir()):
        (folder / file.name).symlink_to(file.resolve())  # weights are large
    scores = [row for row in pd.read_csv(table).itertuples() if row.system == "awares"]
    about: dict[str, Any] = {"params": params, "of_hub": isinstance(params.model_path(), str)}
    card = ModelCard.from_template(ModelCardData(), str(Path(__file__).with_name("card.md")), **about, scores=scores)
    card.save(folder / "README.md")
    return folder


def upload(folder: Path, repo: str, private: bool = True) -> str:
    """Upload ``folder`` to ``repo`` (OWNER/NAME); the commit's address. AwaresError if it fails."""
    api = HfApi(token=os.environ.get("HF_TOKEN"))
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo, commit_message="From awares"))
    except Exception as error:  # many types, from the hub or the network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AwaresError(f"push to {repo} failed: {reason}. Set HF_TOKEN to a write token") from error


def require(path: Path, stage: str) -> Path:
    """``path``; AwaresFileError if ``stage`` has not written this file."""
    if not path.is_file():
        raise AwaresFileError(f"{path}: not there yet; run `dvc repro {stage}`")
    return path


def stable_copy(notebook: nbformat.NotebookNode, root: Path) -> nbformat.NotebookNode:
    """A copy without ids, timings, stderr (progress bars, warnings) and paths of this machine."""
    text = nbformat.writes(notebook).replace(f"{root}/", "").replace(str(root), ".")
    clean = nbformat.reads(text, as_version=4)
    clean.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    clean.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(clean.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            kept = [output for output in cell.outputs if "<progress" not in output.get("data", {}).get("text/html", "")]
            cell.outputs = [output for output in kept if output.get("name") != "stderr"]
    return clean


def clear(folder: Path) -> Path:
    """An empty ``folder``, so that nothing of an earlier run remains there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main(profile: str = "", stage: str = "report") -> int:
    """``python -m awares.study.publish [PROFILE [STAGE]]``; returns the exit code."""
    try:
        params = load_params(profile)
        print(*(file.relative_to(params.root) for file in publish(params, stage)), sep="\n")
    except AwaresError as error:
        print(f"awares.study.publish: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
