"""Benchmark scores, bootstrap intervals and diagnostics against values worked out by hand."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from awares.errors import AwaresError
from awares.method import evaluation, metrics

SCORES = {  # prediction | accepted answers | score
    "chartqa": ["105 | 100 | 1", "105.1 | 100 | 0", "41% | 0.42 | 1", "41% | 41 | 0", "0.0 | 0 | 0", "Red | red | 1"],
    "docvqa": ["Hello World | hello  world | 1", "kitten | sitting, kittens | 6/7", "kittens | kitten | 6/7",
               "abcd | abxy | 1/2", "abcd | axyz | 0", "_abc_ | abd | 4/5"],  # the raw length, outer spaces included
    "ocrbench": ["It reads OPEN\n24 hours. | open 24 | 1", "\uff21\uff22 1 | ab\u3000\uff11 | 1",
                 "LaTeX: x ^ { 2 }\n+ Y | x^{2} + Y | 1", "LaTeX: x^{2}+y | x^{2} + Y | 0"],  # case counts
    "pope": ["_Yes_ | yes | 1", "Yes. | yes | 0"],  # lmms-eval compares whole answers
    "realworldqa": ["Left. | left | 1", "three | 3 | 0", "(C) the red one | C | 1", "(C) the red one | A | 0",
                    "First I thought the answer is A, no: the correct answer is C or so | C | 1",
                    "A, I am sure it is not D | A | 1", "Bicycle | B | 1", "left | A | 0"],  # no letter alone: any
    "vstar": ["The answer is B | B | 1", "it looks purple to me | D | 0", "Red. | red, crimson | 1"],
    "my_rows": ["b | b | 1", "Bread | B | 0"],  # only the two benchmarks have options
}  # fmt: skip


@pytest.mark.parametrize("benchmark, case", [(name, case) for name, cases in SCORES.items() for case in cases])
def test_benchmark_scores(benchmark, case):
    prediction, answers, expected = case.removeprefix("LaTeX: ").replace("_", " ").split(" | ")
    found = metrics.score(benchmark, prediction, answers.split(", "), case[:5])
    assert found == pytest.approx(float(Fraction(expected)))
    with pytest.raises(AwaresError, match=benchmark):  # no accepted answers
        metrics.score(benchmark, prediction, [])


def test_bootstrap_interval_is_the_normal_one_for_many_rows():
    values = np.random.default_rng(0).random(1000) < 0.8
    found = metrics.bootstrap_interval(values, seed=1)
    error = np.sqrt(values.mean() * (1 - values.mean()) / 1000)
    assert found.mean == pytest.approx(values.mean()) and found.n == 1000
    assert [found.low, found.high] == pytest.approx([found.mean - 1.96 * error, found.mean + 1.96 * error], abs=0.003)
    assert found == metrics.bootstrap_interval(values, 1) != metrics.bootstrap_interval(values, 2)
    with pytest.raises(AwaresError, match="no rows"):
        metrics.bootstrap_interval([], 0)
    grouped = metrics.bootstrap_interval([1.0] * 300 + [0.0] * 10, 0, groups=["a"] * 300 + ["b"] * 10)
    assert (grouped.mean, grouped.low, grouped.high) == (0.5, 0.5, 0.5)  # the mean of means, resampled in each group


def test_paired_bootstrap_sees_what_unpaired_intervals_hide():
    hard = np.random.default_rng(0).random(400)
    a, b = hard < 0.80, hard < 0.77
    assert metrics.bootstrap_interval(a, 0).low < metrics.bootstrap_interval(b, 0).high  # the intervals overlap
    found = metrics.paired_bootstrap(a, b, 0)
    assert found.p < 0.05 and found.low > 0 and found.mean == pytest.approx(a.mean() - b.mean())
    same = metrics.paired_bootstrap([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], 0)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_a_resampled_ratio_is_that_of_the_rows_that_count(monkeypatch):
    values, wholes = [1, 0, 0, 1, 0], [1, 0, 1, 1, 0]
    share, draws = metrics.resampled_means(values, 0, 500, denominators=wholes)
    assert share == pytest.approx(2 / 3) and np.isnan(draws).any()  # sometimes no drawn row counts
    assert np.nanmean(draws) == pytest.approx(2 / 3, abs=0.03)
    monkeypatch.setattr(metrics, "_INDICES", 70)  # the memory bound does not change the draws
    assert np.array_equal(draws, metrics.resampled_means(values, 0, 500, None, wholes)[1], equal_nan=True)


def test_cdp_diagnostics_by_hand():
    exact, relaxed = ("HR", ("top-left",), ("top-left",)), ("HR", ("left",), ("top-left",))
    elsewhere, missed = ("HR", ("bottom-right",), ("top-left",)), ("HR", (), ("top",))
    rows = [exact, relaxed, elsewhere, missed, *[("LR", ("all",), ()), ("LR", (), ())] * 2]  # label, requested, oracle
    found = evaluation.cdp_diagnostics(*zip(*rows, strict=True))
    ratios = {"call_rate": 5 / 8, "precision": 0.6, "recall": 0.75, "f1": 2 / 3, "fpr": 0.5, "exact": 1 / 3}
    assert found == pytest.approx({"n": 8, "calls": 5, **ratios, "relaxed": 2 / 3, "area": 0.6})
    silent = evaluation.cdp_diagnostics(["LR", "LR"], [(), ()], [(), ()])
    assert (silent["call_rate"], silent["fpr"]) == (0, 0)
    assert np.isnan([silent[name] for name in ("precision", "recall", "exact", "area")]).all()
    with pytest.raises(AwaresError, match="LR or HR"):
        evaluation.cdp_diagnostics(["hr"], [()], [()])


def test_format_table_counts_attempted_calls_only():
    statuses = ["valid"] * 6 + ["recovered"] * 1 + ["malformed"] * 3 + ["none"] * 10
    trajectories = [SimpleNamespace(call_status=status) for status in statuses]
    table = evaluation.format_table({"sft": trajectories, "silent": trajectories[-1:]})
    assert table.iloc[0, 1:].tolist() == pytest.approx([60, 40, 10, 30, 10, 20]) and np.isnan(table.valid[1])
