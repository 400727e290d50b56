"""Diagnostics of a policy for tables and figures: intervals, policy flow, kinds of error, the oracle frontier."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd

from awares.method.crops import CROPS, Box, coverage
from awares.method.evaluation import CALL_STATUSES, decision_parts, scored
from awares.method.judges import HR
from awares.method.metrics import percentiles, resampled_means
from awares.method.rollout import Trajectory
from awares.settings import FREE_BOX, Evaluation

NO_CALL, SEVERAL = "no call", "several"
OUTCOMES = (NO_CALL, *CROPS, SEVERAL, FREE_BOX)  # of a first turn: no region, one of the ten, several, one free box
ERROR_KINDS = ("correct", "when", "where", "reading")


def first_turn_intervals(
    policies: Mapping[str, Sequence[Trajectory]], rows: datasets.Dataset, evaluation: Evaluation
) -> pd.DataFrame:
    """Tables 7 and 9 with intervals over rows (percent, area 0 to 1, nan: 0/0): policy, quantity, value, low, high."""
    records = []
    for policy, trajectories in policies.items():
        statuses = np.array([done.call_status for done in trajectories])
        requests = [done.crops for done in trajectories]
        parts = decision_parts(rows["label"][:], requests, rows["target_crops"][:], evaluation.relaxed_iou)
        called = (statuses != "none").astype(float)
        parts |= {status: ((statuses == status).astype(float), called) for status in CALL_STATUSES}
        for quantity, (values, wholes) in parts.items():
            mean, draws = resampled_means(values, evaluation.seed, evaluation.bootstrap, denominators=wholes)
            low, high = percentiles(draws if np.isnan(mean) else draws[~np.isnan(draws)], evaluation.level)
            scale = 1 if quantity == "area" else 100
            records.append((policy, quantity, scale * mean, scale * low, scale * high))
    return pd.DataFrame(records, columns=["policy", "quantity", "value", "low", "high"])


def outcome(crops: Sequence[str]) -> str:
    """The outcome (one of ``OUTCOMES``) of a first turn that requested ``crops``; a malformed call is no call."""
    if len(crops) > 1:
        return SEVERAL
    return NO_CALL if not crops else crops[0] if crops[0] in CROPS else FREE_BOX


def outcome_shares(requests: Mapping[Any, Sequence[Sequence[str]]], group: str = "policy") -> pd.DataFrame:
    """Percent of each outcome of first turns (Fig. 5 as a table): the ``group``, outcome, share, n.

    ``requests``: name of the group -> crops requested row by row. Free boxes only if somebody requested one.
    """
    found = {name: [outcome(crops) for crops in each] for name, each in requests.items()}
    kinds = OUTCOMES if any(FREE_BOX in each for each in found.values()) else OUTCOMES[:-1]
    records = [(name, kind, each.count(kind), len(each)) for name, each in found.items() for kind in kinds]
    table = pd.DataFrame(records, columns=[group, "outcome", "share", "n"])
    return table.assign(share=100 * (table.share / table.n.clip(lower=1)))


def evidence_boxes(rows: datasets.Dataset) -> list[list[Box]]:
    """Question and answer boxes of each row, (x1, y1, x2, y2) in 1/1000 of the image."""
    return [[*q, *a] for q, a in zip(rows["question_boxes"], rows["answer_boxes"], strict=True)]


def shows(crops: Sequence[str], boxes: Sequence[Box], threshold: float = 0.95) -> bool:
    """Whether ``crops`` cover at least ``threshold`` of every box."""
    return all(coverage(box, crops) >= threshold for box in boxes)


def error_table(scores: pd.DataFrame, labelled: datasets.Dataset, threshold: float) -> pd.DataFrame:
    """Why rows failed, in percent of a system's rows. Columns system, kind, share, rows.

    ``correct``: a score of at least 0.5. ``when``: HR, but no crop was requested. ``where``: HR, and the crops do not
    show all evidence. ``reading``: the evidence was in view; a call without known evidence cannot miss.
    ``scores``: of `evaluation.scored`, systems on the rows ``labelled``.
    """
    hr, evidence, records = np.array(labelled["label"][:]) == HR, evidence_boxes(labelled), []
    for system, part in scores.groupby("system", sort=False):
        called = part.crops.map(len).gt(0).to_numpy()
        seen = np.array([shows(crops, boxes, threshold) for crops, boxes in zip(part.crops, evidence, strict=True)])
        reasons = [part.score.to_numpy() >= 0.5, hr & ~called, hr & ~seen]
        kinds = np.select(reasons, ERROR_KINDS[:3], ERROR_KINDS[3]).tolist()
        records += [(system, kind, 100 * kinds.count(kind) / len(kinds), kinds.count(kind)) for kind in ERROR_KINDS]
    return pd.DataFrame(records, columns=["system", "kind", "share", "rows"])


class Frontier(NamedTuple):
    """The best accuracy (0 to 1) of any policy over these options, the RTR it costs, and the curve up to it.

    ``choice`` (N,): the cheapest best option of each row. ``rtr_curve``, ``accuracy_curve`` (K + 1,): from the cheapest
    option everywhere, rows move to their choice one by one, the largest gain per token first.
    """

    accuracy: float
    rtr: float
    choice: np.ndarray
    rtr_curve: np.ndarray
    accuracy_curve: np.ndarray


def oracle_frontier(scores: Any, rtrs: Any) -> Frontier:
    """Frontier of ``scores`` and ``rtrs`` (N rows, K options): a row's cheapest best option, the earlier at a tie."""
    scores, rtrs = np.asarray(scores, float), np.asarray(rtrs, float)
    rows = np.arange(len(scores))
    choice = np.where(scores >= scores.max(axis=1, keepdims=True), rtrs, np.inf).argmin(axis=1)
    cheapest = rtrs.argmin(axis=1)
    gain = scores[rows, choice] - scores[rows, cheapest]
    cost = rtrs[rows, choice] - rtrs[rows, cheapest]
    moved = np.flatnonzero(gain > 0)
    moved = moved[np.argsort(-gain[moved] / np.maximum(cost[moved], 1e-12), kind="stable")]
    start = np.array([[rtrs[rows, cheapest].mean()], [scores[rows, cheapest].mean()]])
    steps = np.cumsum([cost[moved], gain[moved]], axis=1) / len(rows)  # (2, K)
    curve = start + np.concatenate([np.zeros((2, 1)), steps], axis=1)
    return Frontier(float(curve[1, -1]), float(curve[0, -1]), choice, curve[0], curve[1])


def run_frontier(policy: str, engine: Any, rows: datasets.Dataset) -> Frontier:
    """The oracle frontier of ``policy``: it answers ``rows`` with no call and with each of the ten single crops."""
    found = []
    for option in [(), *((name,) for name in CROPS)]:
        done = engine.run(rows["image"], rows["question"], forced=[option] * len(rows), row_ids=rows["id"])
        found.append(scored(policy, rows, done))
    return oracle_frontier(*(np.stack([one[column] for one in found], axis=1) for column in ("score", "rtr")))
