"""Folders for the hub are whole, their cards have the numbers of the run's tables, and a dry run uploads nothing."""

import functools
import json
from dataclasses import replace

import huggingface_hub
import pandas as pd
import pytest
from conftest import ROOT
from test_curation import make_rows

from awares.cli import hub
from awares.cli import main as cli
from awares.config import load_params
from awares.engine.rows import save_rows
from awares.errors import AwaresError

KEY = "hf_planted_3c1e"


@pytest.fixture
def params(tmp_path):
    """A finished run, of files that hold just enough."""
    params = load_params(overrides={"paths.runs": str(tmp_path / "runs")})
    table = "system,benchmark,accuracy,accuracy_low,accuracy_high,rtr,n\n"
    table += "full,chartqa,91,90,92,1,200\nawares,chartqa,88.25,85,91.5,0.37,200\n"
    files = {"evaluation/tables/table1_main.csv": table}
    for stage in ("sft", "grpo"):
        files[f"{stage}/adapter/adapter_config.json"] = json.dumps({"r": 8, "base_model_name_or_path": str(tmp_path)})
        files[f"{stage}/adapter/adapter_model.safetensors"] = stage
    files |= {f"grpo/merged/{name}": "merged" for name in ("config.json", "model.safetensors")}
    files |= {f"curation/{split}/verdicts.jsonl": '{"id": "row-0"}\n' for split in ("train", "validation")}
    for name, text in files.items():
        stage, _, rest = name.partition("/")
        file = params.run_dir(stage) / rest
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    rows = make_rows(4).add_column("label", 2 * ["LR", "HR"]).add_column("target_crops", 2 * [[], ["top"]])
    for split in ("train", "validation"):
        save_rows(rows, params.run_dir("curation") / split / "dataset")
    return params


def names_in(folder):
    return [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]


def test_a_policy_goes_up_whole_with_the_numbers_of_its_own_table(params):
    folder = hub.policy_folder(params)
    kinds = [f"{stage}/adapter_{kind}" for stage in ("grpo", "sft") for kind in ("config.json", "model.safetensors")]
    adapters = [f"adapters/{kind}" for kind in kinds]
    assert names_in(folder) == ["README.md", *adapters, "config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_text() == "merged"
    for stage, base in (("sft", "data/base"), ("grpo", "../sft")):
        config = json.loads((folder / "adapters" / stage / "adapter_config.json").read_text())
        assert config == {"r": 8, "base_model_name_or_path": base}
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert [(one.dataset_name, one.metric_value) for one in card.data.eval_results] == [("chartqa (mini)", 88.25)]
    assert "| chartqa | 88.25 (85.00-91.50) | 0.37 | 200 |" in card.text and "91.00" not in card.text
    assert str(ROOT) not in card.content
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    other = replace(params, base=replace(params.base, model="Qwen/Qwen2.5-VL-3B-Instruct"))
    card = huggingface_hub.ModelCard.load(hub.policy_folder(other) / "README.md")
    assert (card.data.license, card.data.base_model) == ("other", other.base.model)
    (params.run_dir("evaluation") / "tables" / "table1_main.csv").unlink()
    with pytest.raises(AwaresError, match="table1_main.csv.*dvc repro evaluation"):
        hub.policy_folder(params)


def test_rows_go_up_without_images_unless_asked_for_and_with_their_sources_terms(params):
    folder = hub.dataset_folder(params)
    splits = ("train", "validation")
    files = [*(f"data/{split}.parquet" for split in splits), *(f"raw/{split}/verdicts.jsonl" for split in splits)]
    assert names_in(folder) == ["README.md", *files]
    rows = pd.read_parquet(folder / "data" / "train.parquet")
    assert "image" not in rows and rows.label.tolist() == ["LR", "HR", "LR", "HR"]
    card = huggingface_hub.DatasetCard.load(folder / "README.md")
    assert "| chartqa | generated | Apache-2.0 |" in card.text and card.data.license == "apache-2.0"
    own = replace(params, data=replace(params.data, sources=("chartqa", "some/where/private.jsonl")))
    card = huggingface_hub.DatasetCard.load(hub.dataset_folder(own) / "README.md")
    assert "| private | rows of the uploader's own | not stated |" in card.text and card.data.license == "other"
    assert "some/where" not in card.content
    assert "image" in pd.read_parquet(hub.dataset_folder(params, images=True) / "data" / "train.parquet")
    with pytest.raises(AwaresError, match="curation.released"):
        hub.dataset_folder(replace(params, curation=replace(params.curation, released="awares")))


def test_a_dry_run_uploads_nothing_and_a_failed_push_keeps_the_token(params, monkeypatch, capsys):
    monkeypatch.setattr("awares.config.load_params", lambda profile: params)
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setattr(hub, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9"))
    assert cli.main(["push", "policy", "me/x", "--dry-run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert cli.main(["push", "policy", "me/x"]) == 1
    said = capsys.readouterr().err
    assert "me/x" in said and "HF_TOKEN" in said and KEY not in said
