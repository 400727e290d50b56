"""Folders for the hub are whole, their cards have the numbers of the run's tables, and a dry run uploads nothing."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
from test_curation import make_rows

from awares.cli import hub
from awares.cli import main as cli
from awares.config import load_params
from awares.engine.rows import save_rows
from awares.errors import AwaresError

ROOT = Path(__file__).parents[2]
KEY = "hf_planted_3c1e"
FILES = ("config.json", "model.safetensors")


@pytest.fixture
def params(tmp_path):
    """A finished run, of files that hold just enough."""
    params = load_params(path=ROOT / "params.yaml", overrides={"paths.runs": str(tmp_path / "runs")})
    merged = params.run_dir("grpo") / "merged"
    merged.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (merged / name).write_text("merged")
    for stage in ("sft", "grpo"):
        adapter = params.run_dir(stage) / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").write_text(stage)
        (adapter / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": f"{tmp_path}/x"}))
    tables = params.run_dir("evaluation") / "tables"
    tables.mkdir(parents=True)
    columns = ["system", "benchmark", "accuracy", "accuracy_low", "accuracy_high", "rtr", "n"]
    lines = [("full", "chartqa", 91.0, 90.0, 92.0, 1.0, 200), ("awares", "chartqa", 88.25, 85.0, 91.5, 0.37, 200)]
    pd.DataFrame(lines, columns=columns).to_csv(tables / "table1_main.csv", index=False)
    labels = ["LR", "HR"]
    for split in ("train", "validation"):
        rows = make_rows(4).add_column("label", 2 * labels).add_column("target_crops", 2 * [[], ["top"]])
        save_rows(rows, params.run_dir("curation") / split / "dataset")
        (params.run_dir("curation") / split / "verdicts.jsonl").write_text('{"id": "row-0"}\n')
    return params


def test_a_policy_goes_up_whole_with_the_numbers_of_its_own_table(params):
    folder = hub.policy_folder(params)
    adapters = [f"adapters/{stage}/adapter_{name}" for stage in ("grpo", "sft") for name in FILES]
    names = [name for name, _ in hub.contents(folder)]
    assert names == ["README.md", *adapters, "config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_text() == "merged"
    for stage, base in (("sft", "data/base"), ("grpo", "../sft")):
        assert (folder / "adapters" / stage / "adapter_model.safetensors").read_text() == stage
        config = json.loads((folder / "adapters" / stage / "adapter_config.json").read_text())
        assert config == {"r": 8, "base_model_name_or_path": base}
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert [(one.dataset_name, one.metric_value) for one in card.data.eval_results] == [("chartqa (mini)", 88.25)]
    assert "| chartqa | 88.25 (85.00-91.50) | 0.37 | 200 |" in card.text and "91.00" not in card.text
    assert "generated rows" in card.text and str(ROOT) not in card.content
    assert card.data.license == "apache-2.0"
    other = replace(params, base=replace(params.base, model="Qwen/Qwen2.5-VL-3B-Instruct"))
    card = huggingface_hub.ModelCard.load(hub.policy_folder(other) / "README.md")
    assert card.data.license == "other" and "Qwen/Qwen2.5-VL-3B-Instruct, trained" in card.text


def test_rows_go_up_without_images_unless_asked_for_and_with_their_sources_terms(params):
    folder = hub.dataset_folder(params)
    names = [name for name, _ in hub.contents(folder)]
    assert names == [
        "README.md",
        "data/train.parquet",
        "data/validation.parquet",
        "raw/train/verdicts.jsonl",
        "raw/validation/verdicts.jsonl",
    ]
    rows = pd.read_parquet(folder / "data" / "train.parquet")
    assert "image" not in rows and rows.label.tolist() == ["LR", "HR", "LR", "HR"]
    card = huggingface_hub.DatasetCard.load(folder / "README.md")
    assert "| train | 4 | 2 |" in card.text and "| chartqa | generated | Apache-2.0 |" in card.text
    assert card.data.license == "apache-2.0"
    own = replace(params, data=replace(params.data, sources=("chartqa", "some/where/private.jsonl")))
    card = huggingface_hub.DatasetCard.load(hub.dataset_folder(own) / "README.md")
    assert "| private | rows of the uploader's own | not stated |" in card.text and card.data.license == "other"
    assert "some/where" not in card.content
    assert "image" in pd.read_parquet(hub.dataset_folder(params, images=True) / "data" / "train.parquet")
    with pytest.raises(AwaresError, match="curation.released: these rows are published already"):
        hub.dataset_folder(replace(params, curation=replace(params.curation, released="awares")))


def test_what_has_not_run_is_named(params):
    (params.run_dir("evaluation") / "tables" / "table1_main.csv").unlink()
    with pytest.raises(AwaresError, match="table1_main.csv: not there yet; run `dvc repro evaluation`"):
        hub.policy_folder(params)


def test_a_dry_run_uploads_nothing_and_a_failed_push_keeps_the_token(params, monkeypatch, capsys):
    monkeypatch.setattr("awares.config.load_params", lambda profile: params)
    monkeypatch.setenv("HF_TOKEN", KEY)
    asked = []
    monkeypatch.setattr(hub, "push", lambda *given, **named: asked.append(given))
    assert cli.main(["push", "policy", "me/x", "--dry-run"]) == 0 and not asked
    assert "model.safetensors" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setattr(hub, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9"))
    with pytest.raises(AwaresError, match="push to me/x failed.*HF_TOKEN") as caught:
        hub.push(hub.policy_folder(params), "me/x", "model")
    assert KEY not in str(caught.value)
    assert not any(
        KEY in json.dumps(file.read_text(errors="replace"))
        for file in Path(params.paths.runs).rglob("*")
        if file.is_file()
    )
