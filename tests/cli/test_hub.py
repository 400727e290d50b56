"""The folder for the hub is whole, its card has the numbers of the run's table, and a dry run uploads nothing."""

import functools
import json
from dataclasses import replace

import huggingface_hub
import pytest
from conftest import ROOT

from awares.cli import main as cli
from awares.config import load_params
from awares.errors import AwaresError
from awares.study import publish

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
    for name, text in files.items():
        stage, _, rest = name.partition("/")
        file = params.run_dir(stage) / rest
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return params


def names_in(folder):
    return [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]


def test_a_policy_goes_up_whole_with_the_numbers_of_its_own_table(params):
    folder = publish.hub_folder(params)
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
    card = huggingface_hub.ModelCard.load(publish.hub_folder(other) / "README.md")
    assert (card.data.license, card.data.base_model) == ("other", other.base.model)
    (params.run_dir("evaluation") / "tables" / "table1_main.csv").unlink()
    with pytest.raises(AwaresError, match="table1_main.csv.*dvc repro evaluation"):
        publish.hub_folder(params)


def test_a_dry_run_uploads_nothing_and_a_failed_push_keeps_the_token(params, monkeypatch, capsys):
    monkeypatch.setattr("awares.config.load_params", lambda profile: params)
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setattr(publish, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9"))
    assert cli.main(["push", "me/x", "--dry-run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert cli.main(["push", "me/x"]) == 1
    said = capsys.readouterr().err
    assert "me/x" in said and "HF_TOKEN" in said and KEY not in said
