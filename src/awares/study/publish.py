"""Executed notebooks -> reports/<profile>/: byte-stable copies and one-file HTML pages.

An executed notebook differs on every run (ids, timings, progress bars). The published copy keeps the results and drops
the rest, so that two runs with the same numbers give the same bytes. ``python -m awares.study.publish PROFILE [STAGE]``
"""

import html
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
from jinja2 import FileSystemLoader
from nbconvert import HTMLExporter

from awares.config import Params, load_params
from awares.errors import AwaresError, AwaresFileError, AwaresValueError

STAGES = {"00_data": "data", "01_curation": "curation", "02_crop_distribution": "crop_distribution", "03_sft": "sft",
          "04_grpo": "grpo", "05_evaluation": "evaluation", "05_operating_curve": "operating_curve",
          "report": "report"}  # fmt: skip
PAGES = {"base_model": "00_base_model", "seeds": "09_seeds", "latency": "07_latency",
         "ablations": "06_ablations_summary", "comparison": "11_comparison",
         "shift": "12_shift", "plus": "13_plus"}  # fmt: skip

HERE = FileSystemLoader(Path(__file__).parent)  # folded.html.j2
NO_ALT = "No description has been provided for this image"  # nbconvert writes this: its template drops alt texts


def publish(params: Params, stage: str = "report") -> list[Path]:
    """Publish the executed notebooks of ``stage``; returns the files written.

    report: the main line (STAGES), the explorer's data. A stage of PAGES: its page in reports/<profile>/<stage>, with
    the notebook of every variant or system. policy: the trained adapters, in data/policy. Raises AwaresError that names
    the first missing file, before anything is written.
    """
    if stage == "policy":
        return copy_adapters(params, params.path("data/policy"), "../../base")
    if stage not in ("report", *PAGES):
        raise AwaresValueError(f"unknown stage {stage!r}: publish {', '.join(('report', *PAGES, 'policy'))}")
    pages = {PAGES[stage]: stage} if stage in PAGES else STAGES
    runs, more = {name: params.run_dir(one) for name, one in pages.items()}, {}
    if params.curation.released and stage == "report":
        runs = {name.replace("01_curation", "01_released"): run for name, run in runs.items()}
    groups = {"ablations": ("curation", "sft", "grpo", "systems"), "plus": ("beyond", "plus")}
    if stage in groups:
        variants = params.variants(*groups[stage])
        more = {f"06_{name}": replace(params, variant=name).run_dir("evaluation") for name in variants}
    elif stage == "comparison":
        more = {f"10_{name}": params.run_dir("systems") / name for name in params.comparison.all}
    sources = {name: require(run / "notebook.ipynb", stage) for name, run in (runs | more).items()}
    explored = (
        [require(runs["05_operating_curve"] / "explorer/rows.js", "operating_curve")] if stage == "report" else []
    )
    folder = params.report_dir() / ("" if stage == "report" else stage)
    files = [Path(shutil.copy(file, clear(folder / "explorer"))) for file in explored]
    notebooks, web_pages = clear(folder / "notebooks"), clear(folder / "html")
    for name, source in sources.items():
        notebook = stable_copy(nbformat.read(source, as_version=4), params.root)
        files.append(notebooks / f"{name}.ipynb")
        nbformat.write(notebook, files[-1])
        if name in runs:  # only those get a page
            files.append(web_pages / f"{name}.html")
            files[-1].write_text(to_html(notebook, name), encoding="utf-8")
    return files


def copy_adapters(params: Params, into: Path, base: str) -> list[Path]:
    """Copy the adapters of SFT and GRPO; each names what it was trained on: ``base``, or the other one (``../sft``)."""
    files, adapters = [], {stage: params.run_dir(stage) / "adapter" for stage in ("sft", "grpo")}
    configs = [require(adapter / "adapter_config.json", stage) for stage, adapter in adapters.items()]
    for (stage, adapter), file, trained_on in zip(adapters.items(), configs, (base, "../sft"), strict=True):
        folder = clear(into / stage)
        config = json.loads(file.read_text()) | {"base_model_name_or_path": trained_on}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.copy(adapter / "adapter_model.safetensors", folder)
        files += sorted(folder.iterdir())
    return files


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
            for output in cell.outputs:
                if "data" in output:  # only the alternative texts of pictures remain
                    alt = output.metadata.get("image/png", {}).get("alt")
                    output.metadata = {"image/png": {"alt": alt}} if alt else {}
    return clean


def to_html(notebook: nbformat.NotebookNode, title: str) -> str:
    """One HTML page that opens anywhere: pictures, their alternative texts and styles inside, no script."""
    exporter = HTMLExporter(embed_images=True, template_file="folded.html.j2", extra_loaders=[HERE])
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    alts = iter([output.metadata.get("image/png", {}).get("alt", NO_ALT) for output in shown])
    body = re.sub(f'alt="{NO_ALT}"', lambda _: f'alt="{html.escape(next(alts, NO_ALT))}"', body)
    return re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL)


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
