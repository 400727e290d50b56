"""The harness on a made-up machine whose speed is known, the systems on a tiny model, and `awares bench` end to end."""

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import ROOT, TASKS
from transformers import AutoModelForImageTextToText

from awares.bench import configs, costs, latency
from awares.bench.latency import PHASES, Script, ScriptedEngine
from awares.cli import main as cli
from awares.data.rows import make_dataset
from awares.engine.chat_format import END_OF_TURN
from awares.engine.model import load_processor
from awares.errors import AwaresError
from awares.method.protocol import OURS
from awares.mini import synthetic_rows


class Sleeper:
    """Plays each system for a known time, in seconds by system and budget, and keeps the order of its jobs."""

    def __init__(self, speeds: dict[tuple[str, int], float]) -> None:
        self.speeds, self.order = speeds, list[tuple[str, int]]()

    def play(self, system: str, budget: int, lap: Any = None) -> list[Any]:
        self.order.append((system, budget))
        time.sleep(self.speeds[system, budget])
        if lap:
            lap("decode", 1)
        return [SimpleNamespace(seconds=self.speeds[system, budget] / 2)] * 2


def test_every_repetition_runs_all_jobs_in_another_order() -> None:
    systems = [f"job{index}" for index in range(5)]
    made = Sleeper(dict.fromkeys(((system, 1) for system in systems), 0.0))
    for _ in range(2):
        latency.time_jobs(made.play, systems, (1,), 6, seed=0, device="cpu")
    rounds = [made.order[at : at + 5] for at in range(0, len(made.order), 5)]
    assert len(rounds) == 14 and all(sorted(one) == sorted(rounds[0]) for one in rounds) and rounds[:7] == rounds[7:]
    assert len({tuple(one) for one in rounds[1:7]}) > 3


def test_times_ratios_and_the_best_batch() -> None:
    speeds = {("full", 1): 0.04, ("full", 100): 0.02, ("full", 200): 0.03, ("half", 1): 0.02, ("half", 100): 0.01}
    speeds["half", 200] = 0.005
    times, _, alone = latency.time_jobs(Sleeper(speeds).play, ("full", "half"), (1, 100, 200), 3, 1, "cpu")
    assert alone["half"].tolist() == [[0.01, 0.01]] * 3
    # what sleeping adds differs from run to run: the arithmetic is checked on the exact values
    exact = times.assign(seconds=[speeds[key] for key in zip(times.system, times.token_budget, strict=True)])
    assert (times.seconds >= exact.seconds).all() and (times.decode_1 >= exact.seconds).all()
    table = latency.time_table(exact).set_index(["system", "batch"])
    expected = {("full", "1"): 20, ("half", "1"): 10, ("full", "best"): 10, ("half", "best"): 2.5}
    assert table.ms.to_dict() == pytest.approx(expected)
    best = table.loc[("half", "best")]
    assert (best.ratio, best.speedup, best.token_budget) == pytest.approx((0.25, 4, 200))
    assert (table.ratio.loc["full"] == 1).all() and table.token_budget[("full", "best")] == 100


def drifting(drifts: dict[float, float]) -> pd.DataFrame:
    """Times of a machine that slows down: drift -> half's time in units of full's, one repetition each."""
    parts = {f"{phase}_{turn}": 0.0 for phase in PHASES for turn in (1, 2)}
    records = [
        {"system": system, "token_budget": budget, "repetition": repetition, "seconds": 2 * drift * ratio}
        for repetition, (drift, half) in enumerate(drifts.items())
        for system, ratio in (("full", 1), ("half", half))
        for budget in (1, 64)
    ]
    return pd.DataFrame(records).assign(rows=4, peak_memory=0.0, **parts)


def test_ratios_are_taken_within_a_repetition() -> None:
    """Pairs: of 0.4, 0.5 and 0.625 the logarithms of the outer two are equally far from that of the middle one."""
    half = latency.time_table(drifting({1.0: 0.5, 1.1: 0.5, 3.0: 0.5})).set_index(["system", "batch"]).loc["half", "1"]
    assert (half.ratio, half.ratio_low, half.ratio_high) == (0.5, 0.5, 0.5)
    assert half.ms_low < half.ms < half.ms_high
    table = latency.pair_table(drifting({3.0: 0.4, 4.0: 0.5, 5.0: 0.625}), ["full"], 0.95)
    assert table[["system", "over", "batch"]].values.tolist() == [["half", "full", "1"], ["half", "full", "best"]]
    low, high = scipy.stats.t.interval(0.95, 2, loc=math.log(0.5), scale=math.log(1.25) / 3**0.5)
    for one in table.itertuples():
        assert (one.ratio, one.ratio_low, one.ratio_high) == pytest.approx((0.5, math.exp(low), math.exp(high)))


def test_time_by_benchmark_is_that_of_rows_alone() -> None:
    alone = {"full": np.array([[0.1, 0.3, 0.8], [0.2, 0.4, 0.6], [0.1, 0.1, 1.0]])}  # repetitions x rows
    table = latency.benchmark_table(alone, ["pope", "pope", "vstar"]).set_index("benchmark")
    assert table.ms.to_dict() == pytest.approx({"pope": 200, "vstar": 800, "average": 500})
    assert table.n.to_dict() == {"pope": 2, "vstar": 1, "average": 3}
    assert table.ms_low["pope"] == pytest.approx(150) and table.ms_high["vstar"] == pytest.approx(900)


def test_scripts_make_rows_write_calls_and_lengths_at_the_price_of_writing_them(tiny: SimpleNamespace) -> None:
    image, called = tiny.noise(224, 168, 0), OURS.render_call(["top-left", "right"])
    scripts = [Script(("top-left", "right"), 5), Script((), 9), Script((), 1), Script(("all",))]
    engine, heard = ScriptedEngine(tiny.model, tiny.processor, max_new_tokens=16), list[tuple[str, int]]()
    engine.decoder.on_phase_end = lambda phase, turn: heard.append((phase, turn))
    done = engine.run_scripts([image] * 4, ["q?"] * 4, dict(zip("abcd", scripts, strict=True)))
    assert heard == [(phase, turn) for turn in (1, 2) for phase in PHASES]
    assert [one.crops for one in done] == [("top-left", "right"), (), (), ("all",)]
    assert [one.turns[-1].text_tokens for one in done[:3]] == [5, 9, 1]
    assert done[0].turns[1].text == called and len(done[0].turns) == 4 and done[0].call_status == "valid"
    assert done[0].turns[1].text_tokens == len(engine.decoder.tokenize(called + END_OF_TURN))
    forced = engine.run([image], ["q?"], forced=[("all",)])[0]  # the same call, given and not written
    assert (done[3].answer, done[3].turns[2:]) == (forced.answer, forced.turns[2:])
    with pytest.raises(AwaresError, match="max_new_tokens is 16"):
        engine.run_scripts([image], ["q?"], {"a": Script((), 17)}, "full")


@pytest.fixture(scope="module")
def embedded() -> SimpleNamespace:
    """The embedded architecture with random weights, a row of each task, and AwaRes at the paper's call rate."""
    torch.set_num_threads(1)
    model, processor = configs.build("mini", 1.0, "float32", "cpu")
    rows = make_dataset([row for task in TASKS for row in synthetic_rows.make_source(task, 1, 11, "evaluation")])
    _, scripts = configs.workload("chartqa", len(rows), (112, 112))
    work = latency.Workload(dict.fromkeys(latency.TIMED_SYSTEMS, model), processor, rows, scripts)
    done = {system: work.play(system, 8192) for system in latency.TIMED_SYSTEMS}
    return SimpleNamespace(model=model, processor=processor, rows=rows, done=done)


def test_systems_do_what_they_are_named_for(embedded: SimpleNamespace) -> None:
    done = embedded.done
    assert all(one.rtr == 1 for one in done["full"]) and all(one.rtr < 0.5 for one in done["half"])
    calls = [one.crops for one in done["awares"]]
    assert 0 < sum(map(bool, calls)) < len(calls) and [one.crops for one in done["awares_naive"]] == calls
    for one, other in zip(done["awares"], done["awares_naive"], strict=True):
        assert one.turns == other.turns or one.margin < 1e-4
    assert {one.crops for one in done["escalate_full"]} == {(), ("all",)}
    assert all(one.rtr > 1 for one in done["escalate_full"] if one.crops)


def test_counted_work_on_the_synthetic_rows(embedded: SimpleNamespace) -> None:
    """Issue 3: the second prefill with reuse <= 60 % of the naive way's FLOPs; FLOPs a row below full resolution's."""
    table = latency.count_table(embedded.done, embedded.model.config, embedded.processor, 4).set_index("system")
    assert table.prefill_2_gflops["awares"] <= 0.6 * table.prefill_2_gflops["awares_naive"]
    assert table.vision_gflops["awares"] < table.vision_gflops["awares_naive"]
    assert table.gflops["half"] < table.gflops["awares"] < table.gflops[["full", "awares_naive"]].min()
    assert table.visual_tokens["awares"] == np.mean([one.visual_tokens for one in embedded.done["awares"]])
    terse = configs.answer_tokens(configs.BENCHMARKS["chartqa"].awares)
    assert {one.turns[-1].text_tokens for one in embedded.done["half"]} == {terse}


@pytest.mark.parametrize(("size", "count"), [("7b", 8_292_166_656), ("3b", 3_754_622_976), ("72b", 73_410_777_344)])
def test_published_sizes(size: str, count: int) -> None:
    """All parameters, as many as the published checkpoints' pages list, of models without memory."""
    tokenizer = load_processor(configs.EMBEDDED_BASE).tokenizer
    config: Any = configs.config_of(f"qwen2.5-vl-{size}", 1.0, tokenizer)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == count
    lookup = 0 if config.tie_word_embeddings else config.text_config.vocab_size * config.text_config.hidden_size
    assert sum(costs.parameters(config)) + lookup == pytest.approx(count, rel=1e-3)  # norms and biases are the rest
    assert config.vision_config.fullatt_block_indexes == [7, 15, 23, 31]
    assert sum(costs.parameters(configs.config_of(f"qwen2.5-vl-{size}", 0.001, tokenizer))) < 0.005 * count


def test_workloads_follow_the_paper() -> None:
    _, scripts = configs.workload("vstar", 50, (112, 112))
    calls = {system: sum(bool(script.crops) for script in some) for system, some in scripts.items()}
    assert calls["awares"] == pytest.approx(0.278 * 50, abs=1) and calls["escalate_full"] == 18 and not calls["full"]
    assert scripts["awares"] == scripts["awares_naive"] and scripts["awares"][0].crops  # a single row is one that calls


def test_bench_measures_counts_and_compares_and_a_kill_loses_one_benchmark(tmp_path: Path, monkeypatch: Any) -> None:
    measure = latency.time_jobs

    def killed(*given: Any) -> Any:
        if (tmp_path / "latency.csv").exists():
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(latency, "time_jobs", killed)
    line = "bench --rows 2 --repetitions 2 --batch-tokens 4096 --scale 0.0001 --attention flash_windows"
    assert cli.main(f"{line} --benchmarks pope --benchmarks vstar --out {tmp_path}".split()) == 130
    table = pd.read_csv(tmp_path / "latency.csv", dtype={"batch": str})
    assert set(table.system) == set(latency.TIMED_SYSTEMS) and set(table.batch) == {"1", "best"} and len(table) == 10
    assert (table.image == "112x112").all() and (table[table.system == "full"].visual_tokens == 4 * 4).all()
    assert (table.benchmark == "pope").all() and (table.ms > 0).all() and (table.gflops > 0).all()
    assert (table.attention == "flash_windows").all() and (table.torch == torch.__version__).all()
    assert {"device", "scale", "dtype", "transformers"} <= set(table) and str(ROOT) not in table.to_csv()
    assert len(pd.read_csv(tmp_path / "times.csv")) == 2 * 2 * 5


def test_bench_times_training_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sizes = "{sft.batch_size: 4, sft.per_device_batch_size: 2, grpo.batch_size: 4, grpo.generations: 2, "
    sizes += "grpo.per_device_batch_size: 2, grpo.max_completion_length: 6, protocol.max_new_tokens: 64}"
    line = ["bench", "--shape", "mini", "--rows", "0", "--train", "--overrides", sizes]
    assert cli.main([*line, "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "latency.csv").exists()
    steps = pd.read_csv(tmp_path / "training.csv").set_index("step")
    assert list(steps.index) == ["sft", "grpo"] and (steps.seconds > 0).all()
    assert steps.layout["sft"] == "4 samples, 2 at a time" and (steps.tokens > 4 * 100).all()
    assert (steps.tokens / steps.seconds).tolist() == pytest.approx(steps.tokens_per_second.tolist(), rel=1e-3)
