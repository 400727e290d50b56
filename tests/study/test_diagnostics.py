"""Kinds of errors, the oracle frontier and the agreement of judges, by hand."""

import datasets
import numpy as np
import pytest

from awares.study import curation_tables, diagnostics


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


def test_judge_agreement_is_the_confusion_matrix():
    columns = {"verdict": [0] * 8, "verdict_a": [2, 2, 2, 0, 1, 0, 0, 0], "verdict_b": [2, 2, 0, 2, 0, 0, 1, 0]}
    curated = datasets.Dataset.from_dict(columns)
    row = curation_tables.judge_agreement(curated).to_dict("records")[0]
    assert (row["judge_a"], row["judge_b"], row["n"]) == ("a", "b", 8)
    assert (row["lr_lr"], row["lr_hr"], row["hr_lr"], row["hr_hr"]) == (50, 12.5, 12.5, 25)
    assert row["agreement"] == 75 and row["kappa"] == pytest.approx((0.75 - 0.53125) / (1 - 0.53125))
    assert curation_tables.label_shares(curated).iloc[0].tolist() == ["a", 50, 12.5, 37.5, 62.5, 37.5, 8]


def test_shares_of_outcomes():
    stages = {"oracle": [(), (), ("top",), ("top", "left")], "sft": [(), ("all",), ("all",), ("all",)]}
    table = diagnostics.outcome_shares(stages).set_index(["policy", "outcome"]).share
    assert table["oracle", "no call"] == 50 and table["oracle", "several"] == 25 and table["sft", "all"] == 75
    assert table.groupby("policy").sum().tolist() == [100, 100] and ("sft", "box") not in table
    boxes = diagnostics.outcome_shares({"p": [(), ("0,0,500,500",)]}).set_index("outcome").share
    assert boxes["box"] == boxes["no call"] == 50 and boxes.sum() == 100
