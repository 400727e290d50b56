"""The forecast follows the parameters, and the preflight finds what is missing, on a real server and real folders."""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from faulty_server import ServerProcess
from hub_server import Gate, gate  # noqa: F401  (a fixture)
from transformers import Qwen3VLConfig

from awares.bench import costs, estimate, preflight
from awares.bench.configs import BENCHMARKS, image_size
from awares.cli import main as cli
from awares.config import load_params
from awares.errors import AwaresError

PARAMS = Path(__file__).parents[2] / "params.yaml"


def forecast(profile="paper", **changes):
    return estimate.forecast(
        load_params(profile, overrides={k.replace("__", "."): v for k, v in changes.items()}, path=PARAMS)
    ).set_index("stage")


def test_the_paper_profile_stage_by_stage():
    table = forecast()
    asked = {
        "curation: judge meta-llama/Llama-3.3-70B-Instruct": 104_000,  # 52k rows, in both orders
        "curation: judge deepseek-ai/DeepSeek-V3.2": 104_000,
        "curation: oracle Qwen/Qwen3-VL-235B-A22B-Instruct": 9_984,
        "curation: base Qwen/Qwen2.5-VL-7B-Instruct": 104_000,  # at both resolutions
    }
    assert list(table.index) == ["data", *asked, "sft", "grpo", "evaluation"]
    assert table.requests[table.requests > 0].to_dict() == asked
    assert (
        table.rows["sft"] == 50_000 and table.rows["grpo"] == 400_000
    )  # 25k rows, two epochs; 50k prompts, eight completions each
    assert (table.gpu_hours[["sft", "grpo", "evaluation"]] > 0.5).all()
    assert table.gpu_hours["grpo"] > 5 * table.gpu_hours["sft"]
    assert 17 < table.gpu_memory_gb["evaluation"] < 80 and table.gpu_memory_gb["sft"] > 17


def test_disk_holds_every_copy():
    """A model is written once and cached once; a training picture lies as fetched, as drawn, and twice each, DVC's copy included, as row and
    as curated row."""
    table, model = forecast(), 8.29e9 * 2 / 1e9  # Qwen2.5-VL-7B in bf16, from its model card
    adapters = 0.1 * 2 * model
    assert table.disk_gb[["sft", "grpo"]].to_list() == pytest.approx([2 * model + adapters] * 2, rel=0.01)
    assert table.gpu_memory_gb["evaluation"] > 3 * model  # the base model and both policies
    tied = forecast(base__model="Qwen/Qwen2.5-VL-3B-Instruct").disk_gb["sft"]
    assert tied == pytest.approx(2.2 * 3.75e9 * 2 / 1e9, rel=0.01)
    stored = table.disk_gb["data"] / 6 / 52_000  # each of its copies of a training picture
    assert table.disk_gb["evaluation"] == pytest.approx(4 * 18_805 * stored)
    sizes = [image_size(name, "paper", 1.0) for name in BENCHMARKS]
    pixels = [width * height * min(1, 2000 / max(width, height)) ** 2 for width, height in sizes]  # crops.max_side
    assert stored == pytest.approx(sum(pixels) / len(sizes) / 2 / 1e9, rel=1e-3)  # half a byte a pixel


def test_flops_are_the_textbooks_two_a_weight_and_token():
    """Attention is small at these lengths, and so is the vision tower's share beside a 7B language model's."""
    params = load_params("paper", path=PARAMS)
    _, language = costs.parameters(estimate.model_config(params))
    sft = forecast().loc["sft"]
    assert sft.pflop == pytest.approx(3 * 2 * language * sft.tokens / 1e15, rel=0.35)  # forward, recomputed, backward
    assert sft.gpu_hours == pytest.approx(sft.pflop * 1e15 / (0.35 * 989e12) / 3600)


def test_the_forecast_follows_the_parameters():
    table = forecast()
    assert forecast(data__train_rows=20_000).pflop["sft"] == pytest.approx(2 * table.pflop["sft"], rel=1e-3)
    assert forecast(plan__utilisation=0.7).gpu_hours["sft"] == pytest.approx(table.gpu_hours["sft"] / 2, rel=1e-3)
    assert forecast(plan__gpu="a100").gpu_hours["sft"] > 3 * table.gpu_hours["sft"]
    assert forecast(grpo__max_steps=100).rows["grpo"] == 6_400
    assert forecast(sft__gradient_checkpointing=False).gpu_memory_gb["sft"] > table.gpu_memory_gb["sft"]
    assert forecast(sft__gradient_checkpointing=False).pflop["sft"] < table.pflop["sft"]
    assert forecast(crops__max_side=1000).pflop["sft"] < 0.7 * table.pflop["sft"]
    assert forecast(data__tasks=["vstar"]).rows["evaluation"] == 191
    mini = forecast("mini")
    assert list(mini.index) == ["data", "curation", "sft", "grpo", "evaluation"]
    assert mini.requests.sum() == 0 and mini.pflop.sum() < table.pflop.sum() / 1000


def test_lmms_eval_scores_all_six_benchmarks_whatever_the_tasks_are():
    def outside(tasks):
        some = [forecast(data__tasks=tasks, evaluation__lmms_eval=python).tokens["evaluation"] for python in ("p", "")]
        return some[0] - some[1]

    assert outside(["vstar"]) == pytest.approx(outside(["vstar", "pope"]), rel=1e-6) and outside(["vstar"]) > 0


def test_measured_rates_take_the_place_of_the_count(tmp_path):
    rates = pd.DataFrame(
        {"step": ["sft", "grpo"], "tokens_per_second": [1000.0, 500.0], "peak_memory_mb": [30e3, 43e3]}
    )
    rates["device"] = "NVIDIA H100"
    rates.to_csv(tmp_path / "training.csv", index=False)
    table = forecast(plan__bench=str(tmp_path))
    assert table.gpu_hours["sft"] == pytest.approx(table.tokens["sft"] / 1000 / 3600, rel=1e-3)
    assert table.gpu_memory_gb[["sft", "grpo"]].tolist() == [30.0, 43.0]
    assert table.basis["grpo"] == "measured on NVIDIA H100"
    with pytest.raises(AwaresError, match="training.csv: no such table; plan.bench"):
        forecast(plan__bench=str(tmp_path / "nowhere"))


def test_the_committed_measurement_is_one_to_plan_with():
    assert forecast(plan__bench="reports/h200").basis["sft"] == "measured on NVIDIA H200"


@pytest.mark.parametrize("name", ["Some/Other", "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen2.5-VL-32B-Instruct"])
def test_a_model_of_unknown_size_is_named_with_the_fix(name):
    said = f"base.model {name}: .*`hf download {name} config.json"
    with pytest.raises(AwaresError, match=said):
        forecast(base__model=name)


def test_a_folder_is_counted_as_what_its_config_says(tmp_path):
    """Qwen3-VL from config.json alone: every token of an image stands for 32 px, not 28."""
    Qwen3VLConfig().save_pretrained(tmp_path)
    sft, other = forecast(base__model=str(tmp_path)).loc["sft"], forecast().loc["sft"]
    config = estimate.model_config(load_params("paper", overrides={"base.model": str(tmp_path)}, path=PARAMS))
    _, language = costs.parameters(config)
    assert sft.pflop == pytest.approx(3 * 2 * language * sft.tokens / 1e15, rel=0.35)
    written = sft.rows * (estimate.TEXT + estimate.ANSWER + 0.278 * (estimate.CALL + estimate.ANSWER))
    assert (sft.tokens - written) / (other.tokens - written) == pytest.approx((28 / 32) ** 2, rel=0.02)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(AwaresError, match="a model of type qwen2_vl; awares runs qwen2_5_vl, qwen3_vl"):
        forecast(base__model=str(tmp_path))


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    running = ServerProcess("judging_server.py", tmp_path / "server.jsonl")
    for name in ("LLAMA", "DEEPSEEK", "QWEN3_VL"):
        monkeypatch.setenv(f"AWARES_{name}_URL", running.url)
    monkeypatch.setenv("AWARES_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.delenv("AWARES_API_KEY", raising=False)
    yield running
    running.stop()


def test_preflight_looks_for_rows_of_ones_own_and_names_what_is_not_declared(server, tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    own = [str(tmp_path / "mine.jsonl"), str(tmp_path / "gone.jsonl")]
    local = {"data.hub_root": str(tmp_path), "base.model": "data/base"}
    found = preflight.preflight(load_params("paper", overrides={**local, "data.sources": own}, path=PARAMS))
    assert [one.there for one in found if one.what.startswith("rows ")] == [True, False]
    for changes, said in (
        ({"data.sources": ["chartqq"]}, "data.sources: 'chartqq' is not declared"),
        ({"curation.released": "awarse"}, "curation.released: 'awarse' is not declared"),
    ):
        with pytest.raises(AwaresError, match=said):
            preflight.preflight(load_params("paper", overrides={**local, **changes}, path=PARAMS))


def test_released_rows_ask_no_judge_and_no_oracle():
    assert list(forecast(curation__released="awares").index) == ["data", "sft", "grpo", "evaluation"]


def test_preflight_says_what_is_there_and_how_to_fix_the_rest(server, tmp_path, monkeypatch):
    (tmp_path / "hub" / "lmms-lab" / "POPE").mkdir(parents=True)
    params = load_params(
        "paper", overrides={"data.hub_root": str(tmp_path / "hub"), "base.model": "data/base"}, path=PARAMS
    )
    found = {one.what.split(" at ")[0]: one for one in preflight.preflight(params)}
    assert found["llama: meta-llama/Llama-3.3-70B-Instruct"].there
    assert found["qwen3_vl: Qwen/Qwen3-VL-235B-A22B-Instruct"].there
    other = found["deepseek: deepseek-ai/DeepSeek-V3.2"]
    assert not other.there and "meta-llama" in other.found and "--served-model-name" in other.fix
    gone = found["base: Qwen/Qwen2.5-VL-7B-Instruct"]
    assert not gone.there and "no answer" in gone.found and "AWARES_BASE_URL" in gone.fix
    gpus = found["8 GPUs here, for data/launch/8gpu.yaml"]
    assert not gpus.there and "base.launch" in gpus.fix
    assert found["dataset lmms-lab/POPE"].there and not found["dataset HuggingFaceM4/ChartQA"].there
    assert not found["lmms-eval"].there and "evaluation.lmms_eval" in found["lmms-eval"].fix
    assert [one for one in found if "disk" in one] and "vLLM for GRPO's rollouts" not in found
    asked = {"curation.released": "awares", "grpo.rollouts": "vllm", "grpo.share_prompts": False}
    other = preflight.preflight(
        load_params("paper", overrides={"data.hub_root": str(tmp_path / "hub"), **asked}, path=PARAMS)
    )
    missing = {one.what: one.fix for one in other if not one.there}
    assert "trl[vllm]" in missing["vLLM for GRPO's rollouts"]
    assert any(what.startswith("dataset") and "AwaRes" in what for what in missing)
    assert not any(
        one.what.startswith(("llama", "deepseek", "qwen3_vl", "base:")) for one in other
    )  # no server is asked
    monkeypatch.setenv("AWARES_API_KEY", "wrong")
    refused = {one.what.split(":")[0]: one for one in preflight.preflight(params)}["llama"]
    assert (
        not refused.there
        and refused.found == "refuses the key"
        and "AWARES_API_KEY" in refused.fix
        and "wrong" not in str(refused)
    )


@pytest.mark.parametrize(
    ("launch", "seen", "planned", "missing"),
    [
        ("8gpu", 8, 8, []),
        ("8gpu", 8, 4, ["set plan.gpus to 8"]),
        ("8gpu", 4, 8, ["name another file in base.launch"]),
        ("2x8gpu", 8, 16, []),
        ("2x8gpu", 8, 8, ["set plan.gpus to 16"]),
        ("1gpu", 8, 1, []),
        ("", 1, 1, []),
        ("", 0, 2, ["name another file in base.launch", "set plan.gpus to 1"]),
    ],
)
def test_gpus_here_are_those_of_a_machine_and_gpus_planned_those_of_all(monkeypatch, launch, seen, planned, missing):
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(total_memory=1e12, name="H"))
    changes = {"base.launch": launch and f"data/launch/{launch}.yaml", "plan.gpus": planned}
    found = list(preflight._gpus(load_params("paper", overrides=changes, path=PARAMS)))
    assert len(found) == 2 + seen and [one.fix for one in found if not one.there] == missing


def test_a_training_with_a_launch_of_its_own_is_looked_at_too(tmp_path):
    (tmp_path / "four.yaml").write_text("num_processes: 4\nnum_machines: 1\n")
    four = str(tmp_path / "four.yaml")
    found = list(preflight._gpus(load_params("paper", overrides={"sft.launch": four}, path=PARAMS)))
    assert [(one.what, one.there, one.fix) for one in found] == [
        (f"4 GPUs here, for {four}", False, "name another file in sft.launch"),
        ("8 GPUs here, for data/launch/8gpu.yaml", False, "name another file in base.launch"),
        ("8 GPUs planned", True, "set plan.gpus to 8"),
    ]
    (tmp_path / "own.yaml").write_text("num_processes: 8\n")
    with pytest.raises(AwaresError, match="own.yaml: 'num_machines' missing"):
        list(preflight._gpus(load_params("paper", overrides={"base.launch": str(tmp_path / "own.yaml")}, path=PARAMS)))


MODEL = "me/Gated-Qwen2.5-VL-3B"
LOCAL = {
    "curation.engine": "local",
    "curation.judge": "anls",
    "curation.judges": ["anls"],
    "curation.oracle": "annotation",
}
SMALL = {"base.model": MODEL, "base.device": "cpu", "evaluation.lmms_eval": "", "data.sources": ["chartqa"], **LOCAL}


@pytest.mark.parametrize(
    ("token", "found", "fix"),
    [
        (None, "gated", "accept its licence on its page and set HF_TOKEN (it is not)"),
        (Gate.WAITING, "gated", "accept its licence on its page and set HF_TOKEN (it is set)"),
        ("hf_mistyped", "refuses the token", "set HF_TOKEN to a valid one, or unset it"),
        (Gate.ACCEPTED, "readable", ""),
    ],
)
@pytest.mark.usefixtures("gate")
def test_a_gated_model_and_dataset_by_token(monkeypatch, token, found, fix):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
    checks = {one.what: one for one in preflight.preflight(load_params("paper", overrides=SMALL, path=PARAMS))}
    for name in (f"model {MODEL}", "dataset HuggingFaceM4/ChartQA"):
        assert (checks[name].there, checks[name].found, checks[name].fix) == (found == "readable", found, fix)
    other = checks["dataset lmms-lab/POPE"]
    assert not other.there and other.found == (
        "refuses the token" if token == "hf_mistyped" else "not found, or private"
    )
    assert not token or token not in str(checks)


@pytest.mark.usefixtures("gate")
def test_the_code_of_the_command_is_1_when_something_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", Gate.ACCEPTED)
    line = ["plan", "--profile", "paper", "--overrides", json.dumps(SMALL), "--check"]
    assert cli.main(line) == 1
    shown = capsys.readouterr().out
    assert f"there   model {MODEL} (readable)" in shown
    assert "MISSING dataset lmms-lab/POPE (not found, or private): check the id" in shown
    assert cli.main([*line, "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {one["there"] for one in checks} == {True, False} and Gate.ACCEPTED not in shown + json.dumps(checks)


def test_the_command_prints_the_table_and_its_code_tells_whether_all_is_there(capsys):
    assert cli.main(["plan", "--profile", "mini", "--check"]) == 0  # needs a disk, nothing else
    shown = capsys.readouterr().out
    assert "grpo" in shown and "there   " in shown and "MISSING" not in shown
    assert cli.main(["plan", "--profile", "paper", "--overrides", "{plan.gpus: 64}", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["profile"] == "paper" and len(printed["stages"]) == 8 and printed["checks"] == []
