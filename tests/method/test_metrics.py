"""Benchmark scores, bootstrap intervals and diagnostics against values worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from awares.errors import AwaresError
from awares.method import evaluation, metrics
from awares.study import diagnostics


@pytest.mark.parametrize(
    ("benchmark", "prediction", "answers", "expected"),
    [
        ("chartqa", "105", ["100"], 1),  # 5 % is still right
        ("chartqa", "105.1", ["100"], 0),
        ("chartqa", "41%", ["0.42"], 1),  # a percentage is a fraction
        ("chartqa", "41%", ["41"], 0),
        ("chartqa", "0.0", ["0"], 0),  # around zero only the same text is right
        ("chartqa", "0", ["0"], 1),
        ("chartqa", "Red", ["red"], 1),
        ("docvqa", "Hello World", ["hello  world"], 1 - 0 / 12),
        ("docvqa", "kitten", ["sitting", "kittens"], 1 - 1 / 7),
        ("docvqa", "abcd", ["abxy"], 0.5),  # the threshold itself counts
        ("docvqa", "abcd", ["axyz"], 0.0),
        ("docvqa", "", ["a"], 0.0),
        ("docvqa", " abc ", ["abd"], 1 - 1 / 5),  # the raw length, outer spaces included, as in lmms-eval
        ("ocrbench", "It reads OPEN\n24 hours.", ["open 24"], 1),
        ("ocrbench", "open", ["closed", "Open"], 1),
        ("ocrbench", "\uff21\uff22 1", ["ab\u3000\uff11"], 1),  # full-width forms
        ("pope", " Yes ", ["yes"], 1),
        ("pope", "Yes.", ["yes"], 0),  # lmms-eval compares whole answers
        ("realworldqa", "Left.", ["left"], 1),
        ("realworldqa", "three", ["3"], 0),  # lmms-eval's task reads no number words
        ("vstar", "The answer is B", ["B"], 1),
        ("vstar", "(C) the red one", ["C"], 1),
        ("vstar", "it looks purple to me", ["D"], 0),
        ("vstar", "Red.", ["red", "crimson"], 1),  # no options: an answer in words
        ("my_rows", "b", ["b"], 1),  # only the two benchmarks have options
        ("my_rows", "Bread", ["B"], 0),
        ("textvqa", "Main Street.", ["oak lane", "main street"], 1),
    ],
)
def test_benchmark_scores(benchmark, prediction, answers, expected):
    assert metrics.score(benchmark, prediction, answers) == pytest.approx(expected)


def test_formulas_and_rows_without_answers():
    assert metrics.score("ocrbench", "x ^ { 2 }\n+ Y", ["x^{2} + Y"], "using LaTeX") == 1
    assert metrics.score("ocrbench", "x^{2}+y", ["x^{2} + Y"], "using LaTeX") == 0
    with pytest.raises(AwaresError, match="pope"):  # no accepted answers
        metrics.score("pope", "yes", [])


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("(C) the red one", "C"),
        ("The answer is B", "B"),
        ("First I thought the answer is A, no: the correct answer is C or so", "C"),
        ("A, I am sure it is not D", "A"),  # at the beginning counts more than at the end
        ("Bicycle", "B"),  # no letter on its own: any
        ("left", ""),
    ],
)
def test_realworldqa_reads_the_letter_of_an_option(prediction, letter):
    assert metrics.option_letter(prediction) == letter
    assert [metrics.score("realworldqa", prediction, [answer]) for answer in "ABC"] == [letter == one for one in "ABC"]


# Intervals


def test_bootstrap_interval_is_the_normal_one_for_many_rows():
    values = np.random.default_rng(0).random(1000) < 0.8
    found = metrics.bootstrap_interval(values, seed=1)
    error = np.sqrt(values.mean() * (1 - values.mean()) / 1000)
    assert found.mean == pytest.approx(values.mean()) and found.n == 1000
    assert [found.low, found.high] == pytest.approx([found.mean - 1.96 * error, found.mean + 1.96 * error], abs=0.003)
    with pytest.raises(AwaresError, match="no rows"):
        metrics.bootstrap_interval([], 0)


def test_bootstrap_is_seeded_and_independent_of_the_memory_bound(monkeypatch):
    values = np.random.default_rng(0).random(300)
    assert metrics.bootstrap_interval(values, 1) == metrics.bootstrap_interval(values, 1)
    assert metrics.bootstrap_interval(values, 1) != metrics.bootstrap_interval(values, 2)
    whole = metrics.resampled_means(values, 1, 50)[1]
    monkeypatch.setattr(metrics, "_INDICES", 700)
    assert np.array_equal(whole, metrics.resampled_means(values, 1, 50)[1])


def test_bootstrap_over_groups_is_the_mean_of_their_means():
    values, groups = [1.0] * 300 + [0.0] * 10, ["a"] * 300 + ["b"] * 10
    found = metrics.bootstrap_interval(values, 0, groups=groups)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)  # resampled inside each group: no spread is left


def test_paired_bootstrap_sees_what_unpaired_intervals_hide():
    hard = np.random.default_rng(0).random(400)
    a, b = hard < 0.80, hard < 0.77
    assert metrics.bootstrap_interval(a, 0).low < metrics.bootstrap_interval(b, 0).high  # the intervals overlap
    found = metrics.paired_bootstrap(a, b, 0)
    assert found.p < 0.05 and found.low > 0 and found.mean == pytest.approx(a.mean() - b.mean())
    same = metrics.paired_bootstrap([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], 0)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_a_resampled_ratio_is_that_of_the_rows_that_count():
    values, wholes = [1, 0, 0, 1, 0], [1, 0, 1, 1, 0]
    share, draws = metrics.resampled_means(values, 0, 500, denominators=wholes)
    assert share == pytest.approx(2 / 3) and np.isnan(draws).any()  # sometimes no drawn row counts
    drawn = np.random.default_rng(0).integers(0, 5, (500, 5))
    with np.errstate(invalid="ignore"):
        expected = np.array(values)[drawn].sum(1) / np.array(wholes)[drawn].sum(1)
    assert np.array_equal(draws, expected, equal_nan=True)


# Diagnostics


def test_cdp_diagnostics_by_hand():
    rows = [  # label, requested, oracle
        ("HR", ("top-left",), ("top-left",)),  # exact
        ("HR", ("left",), ("top-left",)),  # relaxed
        ("HR", ("bottom-right",), ("top-left",)),  # elsewhere
        ("HR", (), ("top",)),  # missed
        ("LR", ("all",), ()),  # needless
        *[("LR", (), ())] * 3,
    ]
    found = evaluation.cdp_diagnostics(*zip(*rows, strict=True))
    ratios = {"call_rate": 0.5, "precision": 0.75, "recall": 0.75, "f1": 0.75, "fpr": 0.25, "exact": 1 / 3}
    assert found == pytest.approx({"n": 8, "calls": 4, **ratios, "relaxed": 2 / 3, "area": (0.25 + 0.5 + 0.25 + 1) / 4})


def test_cdp_diagnostics_without_calls_says_nan_not_zero():
    found = evaluation.cdp_diagnostics(["LR", "LR"], [(), ()], [(), ()])
    assert (found["call_rate"], found["fpr"]) == (0, 0)
    assert np.isnan([found[name] for name in ("precision", "recall", "exact", "area")]).all()
    with pytest.raises(AwaresError, match="LR or HR"):
        evaluation.cdp_diagnostics(["hr"], [()], [()])


def test_region_iou():
    adjacent = (["left"], ["top-left"], 0.5), (["all"], ["top-left"], 0.25)  # the paper's example: both are accepted
    union = (["top-left", "top-right"], ["top"], 1), (["top-left"], ["top-left", "bottom-right"], 1)
    for asked, target, expected in (*adjacent, *union, (["center"], ["top-left"], 0.0625 / 0.4375), ([], ["top"], 0)):
        assert evaluation.region_iou(asked, target) == pytest.approx(expected)


def test_format_table_counts_attempted_calls_only():
    statuses = ["valid"] * 6 + ["recovered"] * 1 + ["malformed"] * 3 + ["none"] * 10
    trajectories = [SimpleNamespace(call_status=status) for status in statuses]
    table = evaluation.format_table({"sft": trajectories, "silent": trajectories[-1:]})
    assert table.iloc[0, 1:].tolist() == pytest.approx([60, 40, 10, 30, 10, 20]) and np.isnan(table.valid[1])


def test_policy_flow_shares():
    stages = {"oracle": [(), (), ("top",), ("top", "left")], "sft": [(), ("all",), ("all",), ("all",)]}
    table = diagnostics.policy_flow(stages).set_index(["policy", "outcome"]).share
    assert table["oracle", "no call"] == 50 and table["oracle", "several"] == 25 and table["sft", "all"] == 75
    assert table.groupby("policy").sum().tolist() == [100, 100] and ("sft", "box") not in table
    boxes = diagnostics.policy_flow({"p": [(), ("0,0,500,500",)]}).set_index("outcome").share
    assert boxes["box"] == boxes["no call"] == 50 and boxes.sum() == 100
    with pytest.raises(AwaresError, match="same rows"):
        diagnostics.policy_flow({"a": [()], "b": [(), ()]})


def test_error_kind():
    evidence = [[100, 100, 200, 200], [700, 100, 800, 200]]
    rows = [
        (True, "HR", ()),
        (False, "HR", ()),
        (False, "HR", ("top-left",)),
        (False, "HR", ("top",)),
        (False, "LR", ()),
    ]
    kinds = [diagnostics.error_kind(*row, evidence) for row in rows]
    assert kinds == ["correct", "when", "where", "reading", "reading"]  # top-left shows one of the two boxes


def test_frontier_is_the_cheapest_best_option_of_each_row():
    rng = np.random.default_rng(0)
    scores = (rng.random((60, 11)) < 0.3).astype(float)
    rtrs = 0.25 + np.array([0, 0.25, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 1.0]) + rng.random((60, 1)) * 0.1
    found = diagnostics.oracle_frontier(scores, rtrs)
    total, cost = 0.0, 0.0
    for row, price in zip(scores, rtrs, strict=True):
        right = [p for s, p in zip(row, price, strict=True) if s == 1]
        total, cost = total + bool(right), cost + (min(right) if right else price[0])
    assert (found.accuracy, found.rtr) == pytest.approx((total / 60, cost / 60))
    start = found.accuracy_curve[0], found.rtr_curve[0]
    assert start == pytest.approx((scores[:, 0].mean(), rtrs[:, 0].mean()))
    assert (np.diff(found.rtr_curve) >= 0).all() and (np.diff(found.accuracy_curve) >= 0).all()
    slopes = np.diff(found.accuracy_curve) / np.maximum(np.diff(found.rtr_curve), 1e-12)
    assert (np.diff(slopes) <= 1e-6).all()  # concave: no mixture beats a point of it
    graded = diagnostics.oracle_frontier([[0.6, 1.0, 1.0]], [[0.25, 0.75, 0.5]])
    assert (graded.accuracy, graded.rtr, graded.choice.tolist()) == (1.0, 0.5, [2])
