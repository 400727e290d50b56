"""Executed notebooks -> reports/<profile>/: byte-stable copies and one-file HTML pages.

An executed notebook differs on every run (ids, timings, progress bars). What is published keeps the outputs that say
something and drops the rest, so that two runs with the same numbers give the same bytes.

    python -m awares.publish mini         # what the report stage of dvc.yaml runs last
    python -m awares.publish mini base      # what the frozen stage base_model runs last
    python -m awares.publish mini seeds     # and the stages beside it
    python -m awares.publish mini latency
    python -m awares.publish mini ablations
    python -m awares.publish mini comparison
    python -m awares.publish mini policy    # the trained adapters -> data/policy
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from awares.config import Params, load_params
from awares.errors import AwaresError, AwaresFileError, AwaresValueError

# notebook -> the stage in whose run folder its executed copy lies
STAGES = {
    "00_data": "data",
    "01_curation": "curation",
    "02_crop_distribution": "crop_distribution",
    "03_sft": "sft",
    "04_grpo": "grpo",
    "05_evaluation": "evaluation",
    "report": "report",
}
BASE_MODEL = "00_base_model"  # its executed copy ships with the weights


def publish(params: Params) -> list[Path]:
    """Publish every stage's executed notebook of the main line; returns the files written.

    Raises AwaresError naming the first notebook that is missing, before anything is written.
    """
    executed = {name: params.run_dir(stage) / "notebook.ipynb" for name, stage in STAGES.items()}
    shipped = Path(params.model_path()) / "training.ipynb"
    if shipped.is_file():
        executed = {BASE_MODEL: shipped, **executed}
    for path in executed.values():
        _require(path, "report")
    folder = params.report_dir()
    clear(folder / "notebooks")
    clear(folder / "html")
    return [file for name, path in executed.items() for file in publish_one(path, folder, name, params.root)]


def publish_base(params: Params) -> list[Path]:
    """Put the executed training of the embedded base model beside its weights, as it is published."""
    executed, shipped = params.run_dir("base_model") / "notebook.ipynb", Path(params.model_path()) / "training.ipynb"
    _require(executed, "base_model")
    nbformat.write(normalise(nbformat.read(executed, as_version=4), params.root), shipped)
    return [shipped]


def publish_policy(params: Params) -> list[Path]:
    """Put the adapters of the main run into data/policy, each naming what it was made for: the base model, or the adapter before it."""
    home, made_for = params.path("data/policy"), {"sft": Path("../../base"), "grpo": Path("../sft")}
    adapters = {stage: params.run_dir(stage) / "adapter" for stage in made_for}
    for stage, adapter in adapters.items():
        _require(adapter / "adapter_config.json", stage)
    files = []
    for stage, adapter in adapters.items():
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = made_for[stage].as_posix()
        folder = clear(home / stage)
        shutil.copy(adapter / "adapter_model.safetensors", folder)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        files += [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    return files


def publish_seeds(params: Params) -> list[Path]:
    """Publish the notebook over training seeds beside its tables, in reports/<profile>/seeds."""
    return _publish_beside(params, "seeds", "09_seeds")


def publish_latency(params: Params) -> list[Path]:
    """Publish the latency notebook beside its tables, in reports/<profile>/latency."""
    return _publish_beside(params, "latency", "07_latency")


def publish_ablations(params: Params) -> list[Path]:
    """Publish the summary of the ablations, and every variant's notebook beside it, in reports/<profile>/ablations."""
    files = _publish_beside(params, "ablations", "06_ablations_summary")
    for variant in (name for names in params.ablations.values() for name in names):
        path = replace(params, variant=variant).run_dir("evaluation") / "notebook.ipynb"
        _require(path, "ablations")
        files += publish_one(path, params.report_dir() / "ablations", f"06_{variant}", params.root, page=False)
    return files


def publish_comparison(params: Params) -> list[Path]:
    """Publish the comparison and every compared system's notebook, in reports/<profile>/comparison."""
    files = _publish_beside(params, "comparison", "11_comparison")
    for system in params.comparison.all:
        path = params.run_dir("systems") / system / "notebook.ipynb"
        _require(path, "comparison")
        files += publish_one(path, params.report_dir() / "comparison", f"10_{system}", params.root, page=False)
    return files


def _publish_beside(params: Params, stage: str, name: str) -> list[Path]:
    path = params.run_dir(stage) / "notebook.ipynb"
    _require(path, stage)
    return publish_one(path, params.report_dir() / stage, name, params.root)


def _require(path: Path, stage: str) -> None:
    if not path.is_file():
        raise AwaresFileError(f"{path}: not executed yet; run `dvc repro {stage}`")


def publish_one(executed: Path, folder: Path, name: str, root: Path, page: bool = True) -> list[Path]:
    """Write <folder>/notebooks/<name>.ipynb and, with ``page``, <folder>/html/<name>.html from an executed notebook."""
    notebook = normalise(nbformat.read(executed, as_version=4), root)
    files = [folder / "notebooks" / f"{name}.ipynb", folder / "html" / f"{name}.html"][: 1 + page]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, files[0])
    if page:
        files[1].write_text(to_html(notebook, name), encoding="utf-8")
    return files


def normalise(notebook: nbformat.NotebookNode, root: Path) -> nbformat.NotebookNode:
    """A copy without ids, timings, stderr (progress bars, warnings) and paths of this machine."""
    clean = nbformat.from_dict(notebook)
    clean.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    clean.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(clean.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.outputs = [_clean(output, root) for output in cell.outputs if _lasts(output)]
    return clean


def _lasts(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a result: stderr and the trainers' progress bars hold timings."""
    return output.get("name") != "stderr" and "<progress" not in output.get("data", {}).get("text/html", "")


def _clean(output: nbformat.NotebookNode, root: Path) -> nbformat.NotebookNode:
    """Hide the repository's own folder in whatever text an output holds."""
    if "text" in output:
        output.text = output.text.replace(f"{root}/", "").replace(str(root), ".")
    for kind, content in output.get("data", {}).items():
        if kind.startswith("text/") and isinstance(content, str):
            output.data[kind] = content.replace(f"{root}/", "").replace(str(root), ".")
    output.pop("metadata", None)
    if output.output_type in ("display_data", "execute_result"):
        output.metadata = {}
    return output


def to_html(notebook: nbformat.NotebookNode, title: str) -> str:
    """One HTML page with its pictures and styles inside, and no script: it opens anywhere and loads nothing."""
    exporter = HTMLExporter(embed_images=True)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    return re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL)


def clear(folder: Path) -> Path:
    """An empty ``folder``: what an earlier run published there is not to be mistaken for this one's."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


PUBLISHERS = {
    "": publish,
    "base": publish_base,
    "seeds": publish_seeds,
    "latency": publish_latency,
    "ablations": publish_ablations,
    "comparison": publish_comparison,
    "policy": publish_policy,
}


def main(arguments: list[str]) -> int:
    """``python -m awares.publish [profile [base, seeds, latency, ablations, comparison or policy]]``."""
    profile, what = [*arguments, "", ""][:2]
    try:
        params = load_params(profile)
        if what not in PUBLISHERS:
            raise AwaresValueError(
                f"{what!r}: publish {', '.join(filter(None, PUBLISHERS))}, or name none for the main line"
            )
        for file in PUBLISHERS[what](params):
            print(file.relative_to(params.root))
    except AwaresError as error:
        print(f"awares.publish: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
