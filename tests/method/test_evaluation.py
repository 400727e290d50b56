"""Evaluation: whose score it is, means over benchmarks, labels, files; the operating curve at every bias."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pytest
from conftest import noise, trajectory
from test_rollout import Rigged

from awares.config import load_params
from awares.data.rows import make_dataset
from awares.engine import chat_format, decode
from awares.errors import AwaresError
from awares.method import evaluation
from awares.method.rollout import Engine, Trajectory

PARAMS = load_params("mini", overrides={"evaluation.bootstrap": 100})
EVALUATION = PARAMS.evaluation
REQUESTS = ("top-left", "center,bottom", "malformed", "all")


class Spelling(Rigged):
    """A row that begins with the call token writes the call of its number; the others write freely."""

    def order(self, text: str, written: list[int]) -> str:
        number = int(text.split("question ")[1].split("<")[0])
        return REQUESTS[number % len(REQUESTS)] if written[:1] == [self.token] else ""

    def forbidden(self) -> list[int]:
        return []


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    boxes: dict[str, Any] = {"question_boxes": [], "answer_boxes": [[0, 0, 400, 100]]}
    return make_dataset(
        {"id": f"row-{n}", "image": noise(112 + 56 * (n % 2), 112, n), "question": f"question {n}", **boxes}
        | {"source": ("chartqa", "pope")[n % 2], "answers": ["12"], "split": "evaluation"}
        for n in range(8)
    )


@pytest.fixture
def engine(tiny: SimpleNamespace, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that calls on four of the eight rows."""
    monkeypatch.setattr(Spelling, "tokenizer", tiny.processor.tokenizer)
    monkeypatch.setattr(decode, "FirstToken", Spelling)
    turns = biases_between(run(Engine(tiny.model, tiny.processor, max_new_tokens=1), rows))
    monkeypatch.setattr(Spelling, "lift", turns[len(turns) // 2])
    return Engine(tiny.model, tiny.processor, max_new_tokens=16)


def run(engine: Engine, rows: datasets.Dataset, bias: float = 0.0) -> list[Trajectory]:
    return engine.run(rows["image"], rows["question"], call_bias=bias, row_ids=rows["id"])


def biases_between(done: list[Trajectory]) -> list[float]:
    """Biases that split the rows in every possible way, none close to the bias at which a row changes."""
    turns = sorted(-one.call_gap for one in done if one.call_gap is not None)
    middles = [(low + high) / 2 for low, high in zip(turns, turns[1:], strict=False) if high - low > 1e-3]
    return [turns[0] - 1, *middles, turns[-1] + 1]


def content(one: Trajectory) -> tuple[Any, ...]:
    return one.row_id, one.answer, one.crops, one.call_status, one.turns


def test_derived_is_what_the_engine_does_at_every_bias(engine: Engine, rows: datasets.Dataset) -> None:
    biases = biases_between(run(engine, rows))
    assert len(biases) > 5 and biases[0] < 0 < biases[-1]
    assert math.isfinite(evaluation.FORCING_BIAS)  # -inf would ban the call token at every position
    ran = {bias: [content(one) for one in run(engine, rows, bias)] for bias in biases}
    for start in (biases[0], biases[3], biases[-1]):  # whatever bias the policy itself has
        derived = evaluation.sweep_call_bias(engine, rows, run(engine, rows, start), start, biases)
        assert {bias: [content(one) for one in done] for bias, done in derived.items()} == ran
    begun = [sum(one.turns[1].text.startswith(chat_format.TOOL_CALL) for one in derived[bias]) for bias in biases]
    assert begun == sorted(set(begun)) and (begun[0], begun[-1]) == (0, len(rows))
    assert {one.call_status for one in derived[biases[-1]]} == {"valid", "malformed"}


def test_gap_and_logprob_are_of_the_unbiased_first_token(engine: Engine, rows: datasets.Dataset) -> None:
    for one, other in zip(run(engine, rows), run(engine, rows, 3.0), strict=True):
        assert one.call_gap is not None and one.call_logprob is not None
        assert (other.call_gap, other.call_logprob) == pytest.approx((one.call_gap, one.call_logprob), abs=1e-4)
        assert one.call_logprob < 0 and (one.call_gap > 0) == one.turns[1].text.startswith(chat_format.TOOL_CALL)
        log_odds = -math.log(math.expm1(-one.call_logprob))  # against all others; the gap is against the best
        assert log_odds <= one.call_gap + 1e-4 <= log_odds + math.log(len(engine.processor.tokenizer))
        assert Trajectory.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    forced = engine.run(rows["image"], rows["question"], forced=[()] * len(rows), row_ids=rows["id"])
    with pytest.raises(AwaresError, match="row row-0"):  # it had no choice
        evaluation.sweep_call_bias(engine, rows, forced, 0.0, [0.0])


def test_curve_holds_table_1_and_rtr_grows_with_the_bias(engine: Engine, rows: datasets.Dataset) -> None:
    own = run(engine, rows)
    runs = evaluation.sweep_call_bias(engine, rows, own, 0.0, [*biases_between(own), 0.0])
    table = evaluation.operating_curve("sft", rows, runs, EVALUATION)
    assert table.call_bias.is_monotonic_increasing and table.rtr.is_monotonic_increasing
    assert table.rtr.iloc[0] == 0.25 < table.rtr.iloc[-1] and table.call_rate.iloc[0] == 0
    assert table.call_rate.iloc[-1] == 75  # two of eight rows write an unreadable call and get no crop
    main = evaluation.main_table(evaluation.scored("sft", rows, own), EVALUATION)
    at_zero, average = table[table.call_bias == 0].squeeze(), main[main.benchmark == evaluation.AVERAGE].squeeze()
    assert all(at_zero[name] == average[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "rtr", "n"))


def test_main_table_averages_over_benchmarks_not_rows():
    marks = {"score": [1.0, 1.0, 1.0, 0.0], "rtr": [0.2, 0.2, 0.2, 0.6]}
    scores = pd.DataFrame({"system": "awares", "benchmark": ["chartqa"] * 3 + ["pope"], **marks})
    table = evaluation.main_table(scores, EVALUATION).set_index("benchmark")
    assert table.loc["average", "accuracy"] == 50 and table.loc["average", "rtr"] == pytest.approx(0.4)
    assert table.loc["chartqa", "accuracy_low"] == 100 and table.n.tolist() == [3, 1, 4]


def test_trajectories_are_scored_with_their_rows_and_label_them(rows):
    good = evaluation.scored("full", rows.select([0]), [trajectory(tokens=64)])
    assert good.score.tolist() == [1.0] and good.rtr.tolist() == [1.0]
    with pytest.raises(AwaresError, match="row-0.*other"):
        evaluation.scored("full", rows.select([0]), [trajectory("other")])
    half, full = [trajectory(answer="13"), trajectory()], [trajectory(), trajectory()]
    labelled = evaluation.label_rows(rows.select([0, 1]), half, full, PARAMS)
    assert labelled["label"][:] == ["HR", "LR"] and labelled["target_crops"][:] == [["top-left"], []]


def test_compare_is_paired():
    scores = pd.DataFrame({"score": [1.0, 0.0, 1.0, 0.0], "rtr": 0.5, "benchmark": "pope"})
    both = pd.concat([scores.assign(system="a"), scores.assign(system="b", rtr=1.0)])
    found = evaluation.compare(both, [("a", "b")], EVALUATION).squeeze()
    assert (found.difference, found.low, found.high, found.rtr) == (0, 0, 0, -0.5) and not found.significant
    apart = both.assign(score=1.0 * (both.system == "a"))
    assert evaluation.compare(apart, [("a", "b"), ("b", "a")], EVALUATION).significant.all()


def test_the_same_answers_are_the_same_bytes_whatever_time_they_took(tmp_path):
    done = [trajectory("a"), trajectory("b", crops=("left",))]
    for name, seconds in (("quick", 0.1), ("slow", 9.0)):
        evaluation.save_trajectories(tmp_path / name, [replace(one, seconds=seconds) for one in done])
    assert (tmp_path / "quick").read_bytes() == (tmp_path / "slow").read_bytes()
    assert evaluation.load_trajectories(tmp_path / "slow") == [replace(one, seconds=0.0) for one in done]
    with pytest.raises(AwaresError, match="none.jsonl"):
        evaluation.load_trajectories(tmp_path / "none.jsonl")
