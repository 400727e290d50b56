"""Evaluation: trajectories to scores, Tables 1, 7 and 9, kinds of error, differences, the dial and the oracle
frontier (PAPER §5)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from awares.config import Evaluation, Params
from awares.engine.jsonl import read_records, write_records
from awares.errors import AwaresFileError, AwaresValueError
from awares.method.crops import CROPS
from awares.method.curation import target_crops
from awares.method.judges import JUDGES, label
from awares.method.metrics import bootstrap_interval, paired_bootstrap, resampled_means, score
from awares.method.rollout import Trajectory
from awares.study.diagnostics import (
    ERRORS,
    Frontier,
    cdp_diagnostics,
    decision_parts,
    error_kind,
    format_table,
    oracle_frontier,
)
from awares.study.tables import AVERAGE


def scored(system: str, rows: datasets.Dataset, trajectories: Sequence[Trajectory]) -> pd.DataFrame:
    """One line per row: system, benchmark, row_id, score (0 to 1), rtr, answer, crops, call_status.

    Raises AwaresError when ``trajectories`` are not those of ``rows``, in their order.
    """
    records = []
    for row, one in zip(rows.remove_columns("image"), trajectories, strict=True):
        if row["id"] != one.row_id:
            raise AwaresValueError(f"{system}: trajectory of row {one.row_id} where row {row['id']} was asked")
        mark = score(row["source"], one.answer, row["answers"], row["question"])
        record = {"system": system, "benchmark": row["source"], "row_id": row["id"], "score": mark, "rtr": one.rtr}
        records.append({**record, "answer": one.answer, "crops": one.crops, "call_status": one.call_status})
    return pd.DataFrame(records)


def main_table(scores: pd.DataFrame, evaluation: Evaluation) -> pd.DataFrame:
    """Table 1, long form: system, benchmark, accuracy, accuracy_low, accuracy_high (percent), rtr, n.

    ``scores`` has one line per system and row: system, benchmark, score (0 to 1), rtr. The benchmark ``average`` is the
    mean over benchmarks, its interval resampled inside each of them.
    """
    records = []
    for system, rows in scores.groupby("system", sort=False):
        for benchmark, part in rows.groupby("benchmark", sort=False):
            records.append(_main_row(system, benchmark, part, evaluation))
        records.append(_main_row(system, AVERAGE, rows, evaluation))
    return pd.DataFrame(records)


def _main_row(system: Any, benchmark: Any, rows: pd.DataFrame, evaluation: Evaluation) -> dict[str, Any]:
    groups = rows.benchmark.tolist()
    found = bootstrap_interval(rows.score.tolist(), evaluation.seed, evaluation.bootstrap, evaluation.level, groups)
    accuracies = {"accuracy": found.mean, "accuracy_low": found.low, "accuracy_high": found.high}
    rtr = rows.groupby("benchmark").rtr.mean().mean()
    percent = {name: 100 * value for name, value in accuracies.items()}
    return {"system": system, "benchmark": benchmark, **percent, "rtr": rtr, "n": len(rows)}


def cdp_table(policies: Mapping[str, Sequence[Trajectory]], rows: datasets.Dataset, relaxed_iou: float) -> pd.DataFrame:
    """Table 7: each policy's first turn against label and target crops of curated ``rows``; percent, area 0 to 1."""
    records = []
    for policy, trajectories in policies.items():
        requests = [one.crops for one in trajectories]
        found = asdict(cdp_diagnostics(rows["label"][:], requests, rows["target_crops"][:], relaxed_iou))
        whole = ("n", "calls", "area")
        records.append({"policy": policy, **{k: v if k in whole else 100 * v for k, v in found.items()}})
    return pd.DataFrame(records)


def form_table(policies: Mapping[str, Sequence[Trajectory]]) -> pd.DataFrame:
    """Table 9: how each policy's calls parse, in percent of its calls (nan without any)."""
    return format_table({policy: [one.call_status for one in done] for policy, done in policies.items()})


def first_turn_intervals(
    policies: Mapping[str, Sequence[Trajectory]], rows: datasets.Dataset, evaluation: Evaluation
) -> pd.DataFrame:
    """The shares of Tables 7 and 9 with bootstrap intervals over rows: policy, quantity, value, low, high.

    In percent, area 0 to 1; nan where no row counts, as the region of a policy that never called.
    """
    records = []
    for policy, done in policies.items():
        requests, statuses = [one.crops for one in done], np.array([one.call_status for one in done])
        parts = decision_parts(rows["label"][:], requests, rows["target_crops"][:], evaluation.relaxed_iou)
        called = (statuses != "none").astype(float)
        parts |= {name: ((statuses == name).astype(float), called) for name in ("valid", "recovered", "malformed")}
        for quantity, (values, wholes) in parts.items():
            mean, draws = resampled_means(values, evaluation.seed, evaluation.bootstrap, wholes=wholes)
            draws = draws[~np.isnan(draws)] if not np.isnan(mean) else draws
            low, high = np.quantile(draws, [(1 - evaluation.level) / 2, (1 + evaluation.level) / 2])
            scale = 1 if quantity == "area" else 100
            records.append((policy, quantity, scale * mean, scale * low, scale * high))
    return pd.DataFrame(records, columns=["policy", "quantity", "value", "low", "high"])


def majority_table(rows: datasets.Dataset) -> pd.DataFrame:
    """Accuracy (percent) of always giving the answer that most rows of a benchmark accept. Columns benchmark, answer, accuracy."""
    records = []
    for benchmark in dict.fromkeys(rows["source"]):
        accepted = [
            answers for source, answers in zip(rows["source"], rows["answers"], strict=True) if source == benchmark
        ]
        answer = Counter(form for answers in accepted for form in dict.fromkeys(answers)).most_common(1)[0][0]
        accuracy = 100 * float(np.mean([score(benchmark, answer, answers) for answers in accepted]))
        records.append({"benchmark": benchmark, "answer": answer, "accuracy": accuracy})
    return pd.DataFrame(records)


def label_rows(
    rows: datasets.Dataset, half: Sequence[Trajectory], full: Sequence[Trajectory], params: Params
) -> datasets.Dataset:
    """Evaluation rows with ``label`` and ``target_crops`` by the paper's rule (§2.1), from the base model's two answers.

    The judge is ``evaluation.judge``, the same whichever labelled the training rows, without ``curation.lucky_margin``; the crops come from the
    rows' own boxes, without the oracle's error and margin. For diagnosis only: no system sees them.
    """
    judge = JUDGES[params.evaluation.judge](params)
    lows, highs = ([one.answer for one in done] for done in (half, full))
    verdicts = judge.judge(rows["question"][:], lows, highs, rows["answers"][:])
    labels = [label(verdict.value) for verdict in verdicts if verdict.value is not None]  # a local judge always has one
    boxes = zip(labels, rows["question_boxes"], rows["answer_boxes"], strict=True)
    wanted = [
        target_crops({"question_boxes": q, "answer_boxes": a}, params) if hr == "HR" else [] for hr, q, a in boxes
    ]
    return rows.add_column("label", labels).add_column("target_crops", wanted)


def error_table(scores: pd.DataFrame, labelled: datasets.Dataset, threshold: float) -> pd.DataFrame:
    """Which errors are *when*, *where*, *reading*, in percent of a system's rows. Columns system, kind, share, rows.

    ``scores``: of :func:`scored`, systems with the rows ``labelled``. A row counts as right from a score of 0.5.
    """
    evidence = [[*q, *a] for q, a in zip(labelled["question_boxes"], labelled["answer_boxes"], strict=True)]
    records = []
    for system, done in scores.groupby("system", sort=False):
        facts = zip(done.score, labelled["label"], done.crops, evidence, strict=True)
        kinds = [error_kind(mark >= 0.5, name, crops, boxes, threshold) for mark, name, crops, boxes in facts]
        for kind in ERRORS:
            records.append((system, kind, 100 * kinds.count(kind) / len(kinds), kinds.count(kind)))
    return pd.DataFrame(records, columns=["system", "kind", "share", "rows"])


def compare(scores: pd.DataFrame, pairs: Sequence[tuple[str, str]], evaluation: Evaluation) -> pd.DataFrame:
    """Paired differences a - b of average accuracy (points, with interval and p) and of RTR between systems."""
    records = []
    for a, b in pairs:
        left, right = (scores[scores.system == system] for system in (a, b))
        values = (left.score.tolist(), right.score.tolist())
        found = paired_bootstrap(
            *values, evaluation.seed, evaluation.bootstrap, evaluation.level, left.benchmark.tolist()
        )
        rtr = left.groupby("benchmark").rtr.mean().mean() - right.groupby("benchmark").rtr.mean().mean()
        points = {"difference": 100 * found.mean, "low": 100 * found.low, "high": 100 * found.high}
        records.append({"a": a, "b": b, **points, "p": found.p, "significant": found.significant, "rtr": rtr})
    return pd.DataFrame(records, columns=["a", "b", "difference", "low", "high", "p", "significant", "rtr"])


def frontier(policy: str, engine: Any, rows: datasets.Dataset) -> Frontier:
    """The oracle frontier of ``policy`` on ``rows``: it answers each with no call and with each of the ten single crops."""
    marks, costs = [], []
    for option in [(), *((name,) for name in CROPS)]:
        done = engine.run(rows["image"], rows["question"], forced=[option] * len(rows), row_ids=rows["id"])
        found = scored(policy, rows, done)
        marks.append(found.score)
        costs.append(found.rtr)
    return oracle_frontier(np.stack(marks, axis=1), np.stack(costs, axis=1))


def frontier_row(policy: str, best: Frontier, free: pd.DataFrame) -> dict[str, Any]:
    """How far ``policy`` is from its ``best``: on each row the cheapest right answer of no call and the ten crops.

    ``free``: :func:`scored` of the policy's own choices on the rows of ``best``. Accuracies in percent;
    ``rtr_at_accuracy``: the RTR at which the frontier reaches the policy's accuracy.
    """
    accuracy, rtr = free.score.mean(), free.rtr.mean()
    needed = float(np.interp(accuracy, best.accuracy_curve, best.rtr_curve))
    mine = {"policy": policy, "accuracy": 100 * accuracy, "rtr": rtr}
    return {
        **mine,
        "frontier_accuracy": 100 * best.accuracy,
        "frontier_rtr": best.rtr,
        "rtr_at_accuracy": needed,
        "n": len(free),
    }


def frontier_curve(policy: str, best: Frontier) -> pd.DataFrame:
    """The oracle frontier as a curve: columns system, rtr, accuracy (percent), from no call anywhere to the best."""
    return pd.DataFrame({"system": policy, "rtr": best.rtr_curve, "accuracy": 100 * best.accuracy_curve})


FORCING = 1e9  # logits: a finite bias, which like those of the dial decides the first token and bars no later one


def dial(
    engine: Any, rows: datasets.Dataset, free: Sequence[Trajectory], call_bias: float, biases: Sequence[float]
) -> dict[float, list[Trajectory]]:
    """What a policy does on ``rows`` at each of ``biases``, as :meth:`Engine.run` would: bias -> trajectories.

    ``free``: its own run on these rows at ``call_bias``. The bias decides whether the first token is the call token, and
    nothing after it, so a row has two trajectories. ``free`` has one; the other is run where some bias asks for it,
    and ``call_gap`` tells which one a bias gives. Raises AwaresError for trajectories that had no choice.
    """
    own = [_calls(one, call_bias) for one in free]
    asked = {bias: [_calls(one, bias) for one in free] for bias in biases}
    known = dict(zip(enumerate(own), free, strict=True))  # (row, whether it begins with the call token) -> trajectory
    for call, forcing in ((False, -FORCING), (True, FORCING)):
        wanted = {index for choices in asked.values() for index, choice in enumerate(choices) if choice is call}
        missing = sorted(wanted - {index for index, choice in enumerate(own) if choice is call})
        some = rows.select(missing)
        done = engine.run(some["image"], some["question"], call_bias=forcing, row_ids=some["id"])
        known |= {(index, call): one for index, one in zip(missing, done, strict=True)}
    return {bias: [known[key] for key in enumerate(choices)] for bias, choices in asked.items()}


def _calls(one: Trajectory, bias: float) -> bool:
    if one.call_gap is None:
        raise AwaresValueError(f"row {one.row_id}: no call_gap, the first decision was no choice: run the row unforced")
    return one.call_gap + bias > 0


def dial_table(
    system: str, rows: datasets.Dataset, runs: Mapping[float, Sequence[Trajectory]], evaluation: Evaluation
) -> pd.DataFrame:
    """Accuracy against tokens over the dial, one line per bias, the smallest first.

    Columns system, call_bias, accuracy, accuracy_low, accuracy_high (percent, averaged over benchmarks as in Table 1),
    rtr, call_rate (percent of rows that asked for crops), n. ``runs``: of :func:`dial`.
    """
    records = []
    for bias, done in sorted(runs.items()):
        average = _main_row(system, AVERAGE, scored(system, rows, done), evaluation)
        calls = 100 * float(np.mean([bool(one.crops) for one in done]))
        records.append({**average, "call_bias": bias, "call_rate": calls})
    columns = ["system", "call_bias", "accuracy", "accuracy_low", "accuracy_high", "rtr", "call_rate", "n"]
    return pd.DataFrame(records)[columns]


def save_trajectories(path: Path, done: Sequence[Trajectory]) -> None:
    """What a stage's rows did, a line each. ``seconds`` stay 0: the same answers are the same bytes, and DVC runs nothing again."""
    write_records(path, [{**one.to_dict(), "seconds": 0.0} for one in done])


def load_trajectories(path: Path) -> list[Trajectory]:
    """What `save_trajectories` wrote; AwaresError if it is not there."""
    if not path.is_file():
        raise AwaresFileError(f"{path}: no trajectories here; run the stage that writes them (`dvc repro`)")
    return [Trajectory.from_dict(record) for record in read_records(path)]


LEGIBLE_AT_HALF = 24.0  # px of the full image: the suite's large evidence stands above, its small evidence below


def evidence_heights(rows: datasets.Dataset) -> list[float]:
    """Height of the lowest box that each row's question needs, in px of the full image (inf without boxes)."""
    return [
        min(
            [(box[3] - box[1]) * row["image"].size[1] / 1000 for box in [*row["question_boxes"], *row["answer_boxes"]]],
            default=np.inf,
        )
        for row in rows
    ]


def reading_table(scores: pd.DataFrame, rows: datasets.Dataset) -> pd.DataFrame:
    """Percent right by view and by size of the evidence. Columns view, evidence (small, large, all), accuracy, n.

    ``scores``: of :func:`scored`, one system per view.
    """
    height = dict(zip(rows["id"], evidence_heights(rows), strict=True))
    sized = scores.assign(evidence=["large" if height[name] > LEGIBLE_AT_HALF else "small" for name in scores.row_id])
    records = []
    for view, part in sized.groupby("system", sort=False):
        for name, group in (
            ("small", part[part.evidence == "small"]),
            ("large", part[part.evidence == "large"]),
            ("all", part),
        ):
            records.append((view, name, 100 * group.score.mean(), len(group)))
    return pd.DataFrame(records, columns=["view", "evidence", "accuracy", "n"])
