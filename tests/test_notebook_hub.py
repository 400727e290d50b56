"""The line under profile paper: hub ids pointed at local copies in the published schemas, judge, oracle and base model at real local servers, both
trainings in two processes. What needs CUDA, vLLM or the hub itself is not proven here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import papermill
import published
import pytest
import test_notebooks
import yaml
from test_served import Server

from awares import data, publish
from awares.config import SYSTEMS, TASKS, load_params
from awares.model import save_model
from awares.report import AVERAGE

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


SMOKE = {key: value for key, value in test_notebooks.SMOKE.items() if not key.startswith("curation.")}
SMOKE |= {
    "data.train_rows": 6,
    "data.validation_rows": 2,
    "base.device": "cpu",
    "base.dtype": "float32",
    "base.launch": "data/launch/2cpu.yaml",
    "evaluation.lmms_eval": "",  # a program of another environment: `make lmms` runs it
    "curation.chunk_rows": 16,
    "protocol.max_new_tokens": 12,
    "protocol.token_budget": 4096,
    "sft.per_device_batch_size": 2,
    "sft.share": 1.0,
}
KEY = "sk-planted-paper-0b7d"


@pytest.fixture
def servers(tiny, tmp_path, monkeypatch):
    """The base model behind our own server, and one that plays both judges and the oracle."""
    base = tmp_path / "base"
    save_model(tiny.model, tiny.processor, base)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("AWARES_API_KEY", None)
    command = [
        sys.executable,
        "-m",
        "awares",
        "serve",
        "--mode",
        "chat",
        "--model",
        str(base),
        "--port",
        "0",
        "--name",
        str(base),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    judging = Server(tmp_path / "server.jsonl", "rigged")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWARES_BASE_URL", process.stdout.readline().split()[-1])
    for name in ("LLAMA", "DEEPSEEK", "QWEN3_VL"):
        monkeypatch.setenv(f"AWARES_{name}_URL", judging.url)
    monkeypatch.setenv("AWARES_API_KEY", KEY)
    yield base
    judging.stop()
    process.terminate()
    process.wait()


def test_the_whole_line_runs_under_profile_paper_and_no_key_is_left_behind(servers, tmp_path, monkeypatch):
    declared = yaml.safe_load((ROOT / "data" / "served.yaml").read_text())
    declared["models"]["base"]["model"] = str(servers)
    (tmp_path / "served.yaml").write_text(yaml.safe_dump(declared))
    places = {
        "data.hub_root": published.everything(tmp_path / "hub", count=12, tests=2),
        "paths.runs": tmp_path / "runs",
    }
    places |= {
        "paths.reports": tmp_path / "reports",
        "curation.served_file": tmp_path / "served.yaml",
        "base.model": servers,
    }
    values = {**SMOKE, **{key: str(path) for key, path in places.items()}}
    params = load_params("paper", overrides=values, path=ROOT / "params.yaml")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    overrides = yaml.safe_dump(values, default_flow_style=True, width=10**6).strip()
    for name, stage in publish.STAGES.items():
        executed = params.run_dir(stage) / "notebook.ipynb"
        executed.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            ROOT / "notebooks" / f"{name}.ipynb",
            executed,
            {"profile": "paper", "variant": "main", "overrides": overrides},
            kernel_name="python3",
            progress_bar=False,
            cwd=ROOT / "notebooks",
        )
    curated = data.load_rows(params.run_dir("curation") / "train" / "dataset")
    assert {"verdict_llama", "verdict_deepseek", "verdict_anls"} <= set(curated.column_names)
    assert {"LR", "HR"} == set(curated["label"])
    order = pd.read_csv(params.run_dir("curation") / "tables" / "judge_order.csv").set_index("judge")
    assert order.loc["llama", "same"] == 100 and order.loc["llama", "n"] == len(curated)
    kept = sorted(path.name for path in (tmp_path / "runs" / "paper" / ".replies").iterdir() if path.suffix == ".jsonl")
    assert kept == ["base.jsonl", "deepseek.jsonl", "llama.jsonl", "qwen3_vl.jsonl"]
    table = pd.read_csv(params.run_dir("evaluation") / "tables" / "table1_main.csv")
    assert set(table.benchmark) == {*TASKS, AVERAGE} and set(table.system) == set(SYSTEMS)
    files = [path for folder in ("runs", "reports") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(files) > 50 and not [path for path in files if KEY.encode() in path.read_bytes()]
