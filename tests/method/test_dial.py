"""The operating curve: the trajectories derived from two runs are those of the engine at every bias."""

import json
import math
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pytest
from torch import Tensor

from awares.config import load_params
from awares.data.rows import make_dataset
from awares.engine import chat_format, decode
from awares.errors import AwaresError
from awares.method import evaluation, protocol
from awares.method.rollout import Engine, Trajectory
from awares.study import diagnostics, figures

EVALUATION = load_params("mini", overrides={"evaluation.bootstrap": 100}).evaluation
REQUESTS = ("top-left", "center,bottom", "oops", "all")


class Spelling(decode.FirstToken):
    """A row that begins with the call token goes on with a call of its own; what comes first is left to the model,

    whose call token is lifted by ``lift``, so that it calls on half of the rows.
    """

    tokenizer: Any = None
    lift = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.logits is None:
            self.known = input_ids.shape[1]
            scores[:, self.token] += self.lift
        scores = super().__call__(input_ids, scores)
        written = input_ids.shape[1] - self.known
        for row, ids in enumerate(input_ids):
            text = self.tokenizer.decode(ids)
            if written and ids[self.known] == self.token and "<tool_response>" not in text:
                request = REQUESTS[int(text.split("question ")[1].split("<")[0]) % len(REQUESTS)]
                call = "<tool_call>oops" if request == "oops" else protocol.OURS.render_call(request.split(","))
                wanted = self.tokenizer(call + "<|im_end|>")["input_ids"]
                scores[row] = float("-inf")
                scores[row, wanted[min(written, len(wanted) - 1)]] = 0.0
        return scores


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    from conftest import noise

    return make_dataset(
        {
            "id": f"row-{number}",
            "image": noise(112 + 56 * (number % 2), 112, number),
            "question": f"question {number}",
            "answers": ["12"],
            "source": ("chartqa", "pope")[number % 2],
            "question_boxes": [],
            "answer_boxes": [],
            "split": "evaluation",
        }
        for number in range(8)
    )


@pytest.fixture
def engine(tiny: SimpleNamespace, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(Spelling, "tokenizer", tiny.processor.tokenizer)
    monkeypatch.setattr(decode, "FirstToken", Spelling)
    made = Engine(tiny.model, tiny.processor, max_new_tokens=16)
    gaps = sorted(gaps_of(Engine(tiny.model, tiny.processor, max_new_tokens=1), rows))
    monkeypatch.setattr(Spelling, "lift", -(gaps[3] + gaps[4]) / 2)
    return made


def gaps_of(engine: Engine, rows: datasets.Dataset) -> list[float]:
    return [one.call_gap for one in run(engine, rows, 0.0) if one.call_gap is not None]


def run(engine: Engine, rows: datasets.Dataset, bias: float) -> list[Trajectory]:
    return engine.run(rows["image"], rows["question"], call_bias=bias, row_ids=rows["id"])


def between(gaps: list[float]) -> list[float]:
    """Biases that part the rows in every possible way, none nearer to a row's own turning point than half a gap."""
    turns = sorted(-gap for gap in gaps)
    middles = [(low + high) / 2 for low, high in zip(turns, turns[1:], strict=False) if high - low > 1e-3]
    return [turns[0] - 1, *middles, turns[-1] + 1]


def said(one: Trajectory) -> tuple[Any, ...]:
    return one.row_id, one.answer, one.crops, one.call_status, one.turns


def test_derived_is_what_the_engine_does_at_every_bias(engine: Engine, rows: datasets.Dataset) -> None:
    gaps = gaps_of(engine, rows)
    assert sum(gap > 0 for gap in gaps) == 4
    biases = between(gaps)
    assert len(biases) > 5
    ran = {bias: [said(one) for one in run(engine, rows, bias)] for bias in biases}
    for start in (biases[0], biases[3], biases[-1]):  # from whatever run one has
        derived = evaluation.sweep_call_bias(engine, rows, run(engine, rows, start), start, biases)
        assert {bias: [said(one) for one in done] for bias, done in derived.items()} == ran
    begun = [sum(one.turns[1].text.startswith(chat_format.TOOL_CALL) for one in derived[bias]) for bias in biases]
    assert begun == sorted(set(begun)) and (begun[0], begun[-1]) == (0, len(rows))
    assert {one.call_status for one in derived[biases[-1]]} == {"valid", "malformed"}


def test_the_dial_bars_no_later_call(engine: Engine, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias decides the first token alone, however large it is: -inf would bar the call token at every position."""
    asked: list[float] = []
    engine_run = Engine.run

    def watched(self: Engine, images: Any, questions: Any, **options: Any) -> Any:
        asked.append(options["call_bias"])
        return engine_run(self, images, questions, **options)

    free = run(engine, rows, 0.0)
    monkeypatch.setattr(Engine, "run", watched)
    evaluation.sweep_call_bias(engine, rows, free, 0.0, [-50.0, 50.0])
    assert len(asked) == 2 and all(math.isfinite(bias) for bias in asked)


def test_no_answer_is_computed_twice(engine: Engine, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    free = run(engine, rows, 0.0)
    biases = between(gaps_of(engine, rows))
    ran: list[str] = []
    engine_run = Engine.run

    def watched(self: Engine, images: Any, questions: Any, **options: Any) -> Any:
        ran.extend(options["row_ids"])
        return engine_run(self, images, questions, **options)

    monkeypatch.setattr(Engine, "run", watched)
    dial = evaluation.sweep_call_bias(engine, rows, free, 0.0, [0.0, *biases])
    assert sorted(ran) == sorted(rows["id"]) and dial[0.0] == free
    ran.clear()
    assert evaluation.sweep_call_bias(engine, rows, free, 0.0, [0.0]) == {0.0: free} and not ran


def test_gap_and_logprob_are_of_the_unbiased_first_token(engine: Engine, rows: datasets.Dataset) -> None:
    free, pushed = run(engine, rows, 0.0), run(engine, rows, 3.0)
    for one, other in zip(free, pushed, strict=True):
        assert one.call_gap is not None and one.call_logprob is not None
        assert other.call_gap == pytest.approx(one.call_gap, abs=1e-4)
        assert one.call_logprob < 0 and (one.call_gap > 0) == one.turns[1].text.startswith(chat_format.TOOL_CALL)
        log_odds = -math.log(math.expm1(-one.call_logprob))  # against all others together, the gap against the best
        assert log_odds <= one.call_gap + 1e-4 <= log_odds + math.log(len(engine.processor.tokenizer))
        assert Trajectory.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_trajectories_without_a_choice_are_refused(engine: Engine, rows: datasets.Dataset) -> None:
    forced = engine.run(rows["image"], rows["question"], forced=[()] * len(rows), row_ids=rows["id"])
    with pytest.raises(AwaresError, match="row row-0: no call_gap"):
        evaluation.sweep_call_bias(engine, rows, forced, 0.0, [0.0])


def test_table_holds_table_1_and_rtr_grows_with_the_bias(engine: Engine, rows: datasets.Dataset) -> None:
    free = run(engine, rows, 0.0)
    biases = [*between(gaps_of(engine, rows)), 0.0]
    table = evaluation.operating_curve(
        "sft", rows, evaluation.sweep_call_bias(engine, rows, free, 0.0, biases), EVALUATION
    )
    assert table.call_bias.is_monotonic_increasing and table.rtr.is_monotonic_increasing
    assert table.rtr.iloc[0] == 0.25 < table.rtr.iloc[-1] and table.call_rate.iloc[0] == 0
    assert table.call_rate.iloc[-1] == 75  # two of eight rows write a call that cannot be read, and get no crop
    main = evaluation.main_table(evaluation.scored("sft", rows, free), EVALUATION)
    columns = ["accuracy", "accuracy_low", "accuracy_high", "rtr", "n"]
    own, average = table[table.call_bias == 0], main[main.benchmark == evaluation.AVERAGE]
    assert own[columns].to_numpy().tolist() == average[columns].to_numpy().tolist()


def test_frontier_curve_ends_where_its_row_says(engine: Engine, rows: datasets.Dataset) -> None:
    some = rows.select(range(3))
    free = run(engine, some, 0.0)
    easy = some.map(lambda row: {"answers": [free[some["id"].index(row["id"])].answer]})  # as if it read every row
    best = diagnostics.run_frontier("sft", engine, easy)
    found = diagnostics.frontier_row("sft", best, evaluation.scored("sft", easy, free))
    curve = diagnostics.frontier_curve("sft", best)
    assert (curve.accuracy.iloc[-1], curve.rtr.iloc[-1]) == (found["frontier_accuracy"], found["frontier_rtr"])
    assert found["accuracy"] == found["frontier_accuracy"] == 100 and found["frontier_rtr"] <= found["rtr"]


def test_figure_draws_both_sets_of_rows() -> None:
    line = {"accuracy_low": 40.0, "accuracy_high": 70.0, "call_rate": 10.0, "n": 9}
    dial = pd.DataFrame(
        {"system": s, "rows": r, "call_bias": b, "accuracy": 50 + b, "rtr": 0.4 + b / 20, **line}
        for s in ("sft", "awares")
        for r in ("all", "frontier")
        for b in (-2.0, 0.0, 2.0)
    )
    frontier = pd.DataFrame({"system": "sft", "rtr": [0.25, 0.3], "accuracy": [50.0, 80.0]})
    main = pd.DataFrame(
        {"system": ["full", "half"], "benchmark": evaluation.AVERAGE, "accuracy": 60.0, "rtr": [1.0, 0.25]}
    )
    figure = figures.dial_figure(dial, frontier, main.assign(accuracy_low=50.0, accuracy_high=70.0))
    left, right = figure.axes
    names = [axes.get_legend_handles_labels()[1] for axes in (left, right)]
    assert names[0] == ["SFT only", "AwaRes", "full", "half"] and names[1][-1] == "SFT only: oracle frontier"
    assert all(axes.get_legend() for axes in (left, right))
    assert "9 rows" in left.get_title() and "retain token ratio" in right.get_xlabel()
    assert figures.show(figure).data[:4] == b"\x89PNG"


def test_dial_needs_the_frontiers_rows() -> None:
    with pytest.raises(AwaresError, match=r"evaluation\.dial_rows 5 must be at least evaluation\.frontier_rows 72"):
        load_params("mini", overrides={"evaluation.dial_rows": 5})
