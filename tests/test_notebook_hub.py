"""00_data under profile paper, its hub ids pointed at local copies in the published schemas: the line's first stage, whole."""

import json
from pathlib import Path

import papermill
import published
import pytest
import yaml

from awares import data
from awares.config import TASKS, load_params

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.notebooks


def test_data_notebook_runs_under_profile_paper(tmp_path, monkeypatch):
    hub = published.everything(tmp_path / "hub", count=12, tests=2)
    values = {
        "threads": 1,
        "data.hub_root": str(hub),
        "data.train_rows": 5,
        "data.validation_rows": 2,
        "paths.runs": str(tmp_path / "runs"),
        "report.gallery": 2,
    }
    overrides = yaml.safe_dump(values, default_flow_style=True, width=10**6).strip()
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    papermill.execute_notebook(
        ROOT / "notebooks" / "00_data.ipynb",
        tmp_path / "executed.ipynb",
        {"profile": "paper", "variant": "main", "overrides": overrides},
        kernel_name="python3",
        progress_bar=False,
        cwd=ROOT / "notebooks",
    )
    folder = load_params("paper", overrides=values, path=ROOT / "params.yaml").run_dir("data")
    rows = {split: data.load_rows(folder / split) for split in ("train", "validation", "evaluation")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 25, "validation": 10, "evaluation": 12}
    assert set(rows["evaluation"]["source"]) == set(TASKS)
    records = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [row_id for part in rows.values() for row_id in part["id"]]
    assert all(record["hub"] and record["commit"].startswith("local:") for record in records)
    shown = (tmp_path / "executed.ipynb").read_text()
    assert "HuggingFaceM4/ChartQA" in shown and "of benchmarks" in shown
