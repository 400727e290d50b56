"""The forecast follows the parameters, and the preflight finds what is missing, on a real server and real folders."""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from chat_server import ServerProcess
from hub_server import Gate, gate  # noqa: F401  (a fixture)
from transformers import Qwen3VLConfig

from awares.bench import configs, costs, estimate, plan
from awares.bench.estimate import assumed
from awares.cli import main as cli
from awares.config import load_params
from awares.engine.model import GPU_FIX
from awares.errors import AwaresError

PARAMS = Path(__file__).parents[2] / "params.yaml"
MODEL = "me/Gated-Qwen2.5-VL-3B"
LOCAL = {"curation.engine": "local", "curation.judge": "anls", "curation.judges": ["anls"]}
SMALL = {"base.model": MODEL, "base.device": "cpu", "evaluation.lmms_eval": "", "data.sources": ["chartqa"], **LOCAL}
SMALL["curation.oracle"] = "annotation"


def load(profile="paper", **changes):
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    return load_params(profile, overrides=overrides, path=PARAMS)


def forecast(profile="paper", **changes):
    return estimate.forecast(load(profile, **changes)).set_index("stage")


def check(**changes):
    return {one.what.split(" at ")[0]: one for one in plan.preflight(load(**changes))}


def test_the_paper_profile_stage_by_stage():
    table = forecast()
    requests = {
        "curation: base Qwen/Qwen2.5-VL-7B-Instruct": 104_000,  # at both resolutions
        "curation: judge meta-llama/Llama-3.3-70B-Instruct": 52_000,
        "curation: oracle Qwen/Qwen3-VL-235B-A22B-Instruct-FP8": 9_984,
        "curation: check": 2_000,  # the base model alone: a judge that is requested once grades nothing
    }
    assert list(table.index) == ["data", *requests, "sft", "grpo", "lmms_eval", "evaluation", "operating_curve"]
    assert table.requests[1:5].to_dict() == requests
    assert table.rows[["sft", "grpo"]].to_list() == [25_000 * 2, 50_000 * 8]  # two epochs; eight completions a prompt
    assert set(table.gpus[1:]) == {8} and (table.hours_low < table.hours_high).all()
    assert 17 < table.gpu_memory_gb["evaluation"] < 80 and table.gpu_memory_gb["sft"] > 17
    judge, played = table.iloc[2], table.loc["evaluation"]
    assert judge.hours_low == pytest.approx(0.7 * 52 / 40 + 0.1 + 141 / 0.4 / 3600)
    assert played.requests == pytest.approx(18_805 * (3 + 2 * 1.278), abs=1)
    ends = [played.requests / rate / 3600 + 3 * start for rate, start in ((15, 0.1), (10, 0.3))]  # the client's limit
    assert played[["hours_low", "hours_high"]].tolist() == pytest.approx(ends, rel=1e-4)
    page = (PARAMS.parent / "reports" / "paper" / "README.md").read_text()
    cells = [line.split("|")[5].strip() for line in page.splitlines() if line.startswith("| ")]
    assert cells[1:] == [f"{one.hours_low:.1f} to {one.hours_high:.1f} h" for one in table.itertuples()]


def test_the_forecast_follows_the_parameters():
    """FLOPs are two for each weight and token; attention and the vision tower add little at these lengths."""
    table, (_, language) = forecast(), costs.parameters(estimate.model_config(load()))
    sft = table.loc["sft"]
    assert sft.pflop == pytest.approx(3 * 2 * language * sft.tokens / 1e15, rel=0.35)  # forward, recomputed, backward
    assert sft.hours_low * 8 > 0.8 * sft.pflop * 1e15 / (0.35 * 989e12) / 3600  # and waits
    assert forecast(data__train_rows=20_000).pflop["sft"] == pytest.approx(2 * table.pflop["sft"], rel=1e-3)
    assert forecast(grpo__max_steps=100).rows["grpo"] == 6_400
    assert forecast(sft__gradient_checkpointing=False).pflop["sft"] < table.pflop["sft"]
    mini = forecast("mini")
    assert list(mini.index) == ["data", "curation", "sft", "grpo", "evaluation", "operating_curve"]
    assert mini.requests.sum() == 0 and mini.pflop.sum() < table.pflop.sum() / 1000


def test_more_work_or_less_hardware_takes_longer():
    less, ends = forecast(), ["hours_low", "hours_high"]
    changes = {"plan__gpus": ("grpo", 4), "plan__utilisation": ("grpo", 0.2), "sft__per_device_batch_size": ("sft", 16)}
    changes |= {"evaluation__engine": ("evaluation", "local"), "threads": ("data", 1)}
    for key, (stage, value) in changes.items():
        assert (forecast(**{key: value}).loc[stage, ends] > less.loc[stage, ends]).all(), key
    endless = forecast(grpo__max_completion_length=1024).loc["grpo"]
    assert endless.hours_low == less.hours_low["grpo"] and endless.hours_high > less.hours_high["grpo"]


@pytest.mark.parametrize("gpus", [1, 8])
def test_an_update_waits_for_the_gpu_with_the_largest_images(monkeypatch, gpus):
    monkeypatch.setitem(configs.CALL_RATES, "awares", 0.0)
    sizes, seconds = dict(configs.BENCHMARKS), {}
    for names in (("pope",), ("docvqa",), ("pope", "docvqa")):
        monkeypatch.setattr(configs, "BENCHMARKS", {name: sizes[name] for name in names})
        made = estimate._Forecast(load(plan__bench=""))
        work = made.work(assumed.half)
        seconds[names] = made.slowest(made.params.grpo, gpus, 8, 4, 5.5)
        if len(names) == 1:  # nobody waits
            (row,) = 4 * work.tower + 5.5 * work.language / made.flops + made.host
            assert seconds[names] == pytest.approx(row / gpus)
    small, large, mixed = seconds.values()  # a page is among 8 prompts with probability 255 / 256
    assert mixed == pytest.approx(large if gpus == 8 else (small + large) / 2, rel=0.03)


def test_measured_rates_take_the_place_of_the_assumed_ones(tmp_path):
    """Steps of 10 ms in place of 22 to 34, or a vision tower twice as fast."""
    measured = pd.read_csv(PARAMS.parent / "reports" / "h200" / "latency.csv")
    steps = [configs.answer_tokens(configs.BENCHMARKS[name].awares) - 1 for name in measured.benchmark]
    measured.assign(decode=[10.0 * step for step in steps]).to_csv(tmp_path / "latency.csv", index=False)
    table, faster = forecast(), forecast(plan__bench=str(tmp_path))
    assert table.basis["grpo"].endswith("measured on NVIDIA H200")  # the committed one
    assert table.gpu_memory_gb[["sft", "grpo"]].tolist() == pytest.approx([29.4, 42.7], abs=0.1)
    saved = (table.hours_low - faster.hours_low)["grpo"] * 3600
    assert saved == pytest.approx(6_250 * (assumed.longest + assumed.call) * (0.0223 - 0.010), rel=0.01)
    measured.assign(vision=measured.vision / 2).to_csv(tmp_path / "latency.csv", index=False)
    tower, counted = forecast(plan__bench=str(tmp_path)), forecast(base__attn_implementation="flash_windows")
    assert counted.hours_low["grpo"] < tower.hours_low["grpo"] < table.hours_low["grpo"]


def test_a_folder_is_counted_as_what_its_config_says(tmp_path):
    """Qwen3-VL from config.json alone: a token of an image covers 32 px, not 28."""
    Qwen3VLConfig().save_pretrained(tmp_path)
    sft, other = forecast(base__model=str(tmp_path)).loc["sft"], forecast().loc["sft"]
    _, language = costs.parameters(estimate.model_config(load(base__model=str(tmp_path))))
    assert sft.pflop == pytest.approx(3 * 2 * language * sft.tokens / 1e15, rel=0.35)
    written = sft.rows * (assumed.text + assumed.answer + 0.278 * (assumed.call + assumed.answer))
    assert (sft.tokens - written) / (other.tokens - written) == pytest.approx((28 / 32) ** 2, rel=0.02)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(AwaresError, match="qwen2_vl"):
        forecast(base__model=str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base__model": "Qwen/Qwen3-VL-8B-Instruct"}, "base.model .*hf download Qwen/Qwen3-VL-8B-Instruct config"),
        ({"plan__bench": "nowhere"}, "nowhere/latency.csv.*plan.bench"),
        ({"base__launch": "params.yaml"}, "params.yaml: 'num_processes' missing"),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, named):
    local = {"data__hub_root": str(tmp_path), "evaluation__lmms_eval": "", "curation__released": "awares", **changes}
    with pytest.raises(AwaresError, match=named):
        check(**local)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = ServerProcess(tmp_path / "server.jsonl", "judge")
    for name in ("LLAMA", "DEEPSEEK", "QWEN3_VL"):
        monkeypatch.setenv(f"AWARES_{name}_URL", running.url)
    monkeypatch.setenv("AWARES_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.delenv("AWARES_API_KEY", raising=False)
    yield running
    running.close()


def test_preflight_names_what_is_missing_and_the_fix(server, tmp_path, monkeypatch):
    (tmp_path / "hub" / "lmms-lab" / "POPE").mkdir(parents=True)
    (tmp_path / "mine.jsonl").write_text("{}\n")
    rows = [str(tmp_path / "mine.jsonl"), str(tmp_path / "gone.jsonl"), "chartqa"]
    local = {"data__hub_root": str(tmp_path / "hub"), "base__model": "data/base", "data__sources": rows}
    local |= {"curation__judges": ["llama", "deepseek", "anls"], "evaluation__lmms_eval": "nowhere/python"}
    found = check(**local)
    there = ["llama: meta-llama/Llama-3.3-70B-Instruct", "qwen3_vl: Qwen/Qwen3-VL-235B-A22B-Instruct-FP8"]
    assert all(found[name].there for name in (*there, "dataset lmms-lab/POPE", f"rows {rows[0]}"))
    missing = {
        "deepseek: deepseek-ai/DeepSeek-V3.2": "--served-model-name",  # the server has another model
        "base: Qwen/Qwen2.5-VL-7B-Instruct": "AWARES_BASE_URL",
        "8 GPUs here, for data/launch/8gpu.yaml": "base.launch",
        "lmms-eval": "evaluation.lmms_eval",
        f"rows {rows[1]}": "data.sources",
        "dataset HuggingFaceM4/ChartQA": "data.hub_root",
    }
    for name, fix in missing.items():
        assert not found[name].there and fix in found[name].fix
    released = check(**local, curation__released="awares", grpo__rollouts="vllm", grpo__share_prompts=False)
    assert ".[vllm]" in released["vLLM for GRPO's rollouts"].fix
    assert not set(released) & {*there, "base: Qwen/Qwen2.5-VL-7B-Instruct"}  # released rows need no server
    monkeypatch.setenv("AWARES_API_KEY", "wrong")
    refused = check(**local)[there[0]]
    assert not refused.there and "AWARES_API_KEY" in refused.fix and "wrong" not in str(refused)


@pytest.mark.parametrize(
    ("launch", "seen", "planned", "missing"),
    [
        ("8gpu", 8, 8, []),
        ("8gpu", 4, 4, ["name another file in base.launch", "set plan.gpus to 8"]),
        ("2x8gpu", 8, 16, []),  # eight on each machine
        ("", 0, 2, [f"{GPU_FIX}, or name another file in base.launch", "set plan.gpus to 1"]),
    ],
)
def test_gpus_of_this_machine_and_of_all(monkeypatch, launch, seen, planned, missing):
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(total_memory=1e12, name="H"))
    found = list(plan._gpus(load(base__launch=launch and f"data/launch/{launch}.yaml", plan__gpus=planned), 80.0))
    assert len(found) == 2 + seen and [one.fix for one in found if not one.there] == missing


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
    checks = check(**SMALL)
    for name in (f"model {MODEL}", "dataset HuggingFaceM4/ChartQA"):
        assert checks[name][1:] == (found == "readable", found, fix)
    assert not checks["dataset lmms-lab-encoder/POPE"].there
    assert not token or token not in str(checks)


@pytest.mark.usefixtures("gate")
def test_the_command_prints_the_table_and_its_code_says_whether_all_is_there(monkeypatch, capsys):
    assert cli.main(["plan", "--profile", "mini", "--check"]) == 0  # needs a disk, nothing else
    assert "MISSING" not in capsys.readouterr().out
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", Gate.ACCEPTED)
    line = ["plan", "--profile", "paper", "--overrides", json.dumps(SMALL)]
    assert cli.main([*line, "--check"]) == 1
    shown = capsys.readouterr().out
    assert f"there   model {MODEL} (readable)" in shown and "MISSING dataset lmms-lab-encoder/POPE" in shown
    assert Gate.ACCEPTED not in shown
