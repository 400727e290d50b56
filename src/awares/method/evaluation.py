"""Evaluation (PAPER §5): from trajectories to scores, Tables 1, 7 and 9, paired differences, the operating curve."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from awares.engine.jsonl import read_records, write_records
from awares.errors import AwaresFileError, AwaresValueError
from awares.method.crops import boxes_to_crops, union_area
from awares.method.judges import HR, LR, build_judge, label
from awares.method.metrics import bootstrap_interval, paired_bootstrap, score
from awares.method.rollout import Trajectory
from awares.settings import Evaluation, Params

CropSets = Sequence[Collection[str]]  # one set of crop names per row
AVERAGE = "average"  # the benchmark name of the mean over benchmarks
PLAIN = ("n", "calls", "area")  # columns of Table 7 that are not in percent
CALL_STATUSES = ("valid", "recovered", "malformed")  # of attempted calls
FORCING_BIAS = 1e9  # logits; finite: -inf would ban the call token at every position, not only at the first


def scored(system: str, rows: Dataset, trajectories: Sequence[Trajectory]) -> pd.DataFrame:
    """One line per row: system, benchmark, row_id, score (0 to 1), rtr, answer, crops, call_status.

    Raises AwaresError unless ``trajectories`` belong to ``rows``, in the same order.
    """
    records = []
    for row, done in zip(rows.remove_columns("image"), trajectories, strict=True):
        if row["id"] != done.row_id:
            raise AwaresValueError(f"{system}: expected the trajectory of row {row['id']}, got row {done.row_id}")
        points = score(row["source"], done.answer, row["answers"], row["question"])
        record = {"system": system, "benchmark": row["source"], "row_id": row["id"], "score": points, "rtr": done.rtr}
        records.append({**record, "answer": done.answer, "crops": done.crops, "call_status": done.call_status})
    return pd.DataFrame(records)


def main_table(scores: pd.DataFrame, evaluation: Evaluation) -> pd.DataFrame:
    """Table 1, long form: system, benchmark, accuracy, accuracy_low, accuracy_high (percent), rtr, n.

    ``scores``: one line per system and row with system, benchmark, score (0 to 1), rtr. The benchmark ``average`` is
    the mean over benchmarks; its interval resamples rows inside each benchmark.
    """
    records = []
    for system, rows in scores.groupby("system", sort=False):
        parts = [*rows.groupby("benchmark", sort=False), (AVERAGE, rows)]
        records += [_main_row(system, benchmark, part, evaluation) for benchmark, part in parts]
    columns = ["system", "benchmark", "accuracy", "accuracy_low", "accuracy_high", "rtr", "n"]
    return pd.DataFrame(records, columns=columns)


def _main_row(system: Any, benchmark: Any, rows: pd.DataFrame, evaluation: Evaluation) -> dict[str, Any]:
    groups = rows.benchmark.tolist()
    found = bootstrap_interval(rows.score.tolist(), evaluation.seed, evaluation.bootstrap, evaluation.level, groups)
    percent = {"accuracy": 100 * found.mean, "accuracy_low": 100 * found.low, "accuracy_high": 100 * found.high}
    return {"system": system, "benchmark": benchmark, **percent, "rtr": _mean_rtr(rows), "n": len(rows)}


def _mean_rtr(scores: pd.DataFrame) -> float:
    return scores.groupby("benchmark").rtr.mean().mean()


def compare(scores: pd.DataFrame, pairs: Sequence[tuple[str, str]], evaluation: Evaluation) -> pd.DataFrame:
    """Differences a - b between systems: average accuracy (points, paired bootstrap interval and p) and RTR."""
    records = []
    for a, b in pairs:
        left, right = (scores[scores.system == system] for system in (a, b))
        settings = evaluation.seed, evaluation.bootstrap, evaluation.level, left.benchmark.tolist()
        found = paired_bootstrap(left.score.tolist(), right.score.tolist(), *settings)
        points = {"difference": 100 * found.mean, "low": 100 * found.low, "high": 100 * found.high, "p": found.p}
        significant, rtr = found.low > 0 or found.high < 0, _mean_rtr(left) - _mean_rtr(right)
        records.append({"a": a, "b": b, **points, "significant": significant, "rtr": rtr})
    return pd.DataFrame(records, columns=["a", "b", "difference", "low", "high", "p", "significant", "rtr"])


def label_rows(rows: Dataset, half: Sequence[Trajectory], full: Sequence[Trajectory], params: Params) -> Dataset:
    """Evaluation rows with ``label`` and ``target_crops`` by the paper's rule (§2.1), from the base model's answers.

    For diagnosis only: no system sees them. The judge is ``evaluation.judge``, even if another judge labelled the
    training rows. Crops come from the annotated boxes, without ``curation.lucky_margin`` and ``oracle_margin``.
    """
    judge = build_judge(params.evaluation.judge, params)
    lows, highs = ([done.answer for done in answers] for answers in (half, full))
    verdicts = judge.judge(rows["question"][:], lows, highs, rows["answers"][:])
    labels = [label(verdict.value) for verdict in verdicts if verdict.value is not None]  # a local judge has no None
    boxes = zip(labels, rows["question_boxes"], rows["answer_boxes"], strict=True)
    targets = [list(boxes_to_crops([*q, *a], params.crops)) if name == HR else [] for name, q, a in boxes]
    return rows.add_column("label", labels).add_column("target_crops", targets)


def decision_parts(
    labels: Sequence[str], crops: CropSets, oracle_crops: CropSets, relaxed_iou: float = 0.25
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numerator and denominator (N,) of every ratio of `cdp_diagnostics`; AwaresError for no rows or a wrong label."""
    if not len(labels) or any(name not in (LR, HR) for name in labels):
        raise AwaresValueError("CDP diagnostics need at least one row, each labelled LR or HR")
    hr = np.array([name == HR for name in labels], float)
    call = np.array([bool(names) for names in crops], float)
    hit = hr * call
    known = hit * np.array([bool(names) for names in oracle_crops], float)  # rows without boxes have no target crops
    pairs = list(zip(crops, oracle_crops, strict=True))
    exact = np.array([set(asked) == set(target) for asked, target in pairs], float)
    relaxed = np.array([region_iou(asked, target) >= relaxed_iou for asked, target in pairs], float)
    return {
        "call_rate": (call, np.ones(len(labels))),
        "precision": (hit, call),
        "recall": (hit, hr),
        "f1": (2 * hit, call + hr),
        "fpr": (call - hit, 1 - hr),
        "exact": (hit * exact, known),
        "relaxed": (hit * relaxed, known),
        "area": (np.array([union_area(names) for names in crops]), call),
    }


def cdp_diagnostics(
    labels: Sequence[str], crops: CropSets, oracle_crops: CropSets, relaxed_iou: float = 0.25
) -> dict[str, float]:
    """Diagnostics of the first turn (Table 7), from the label, the requested crops and the oracle's crops of each row.

    n, calls, and ratios from 0 to 1, nan if the denominator is 0. Call: call_rate, precision P(HR | call), recall
    P(call | HR), f1, fpr P(call | LR). Region, over the calls on HR rows with oracle crops: exact = the same set,
    relaxed = IoU >= ``relaxed_iou`` of the requested region with an oracle crop. area: mean requested area per call.
    """
    counts = {"n": len(labels), "calls": sum(bool(names) for names in crops)}
    parts = decision_parts(labels, crops, oracle_crops, relaxed_iou)
    return counts | {name: _ratio(part.sum(), whole.sum()) for name, (part, whole) in parts.items()}


def region_iou(asked: Collection[str], target: Collection[str]) -> float:
    """The best IoU of the requested region (union of ``asked``) with one crop of ``target`` or with their union."""

    def iou(names: Collection[str]) -> float:
        union = union_area([*asked, *names])
        return (union_area(asked) + union_area(names) - union) / union

    return max(iou(names) for names in [*([name] for name in target), target]) if target else 0.0


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else float("nan")


def cdp_table(policies: Mapping[str, Sequence[Trajectory]], rows: Dataset, relaxed_iou: float) -> pd.DataFrame:
    """Table 7: each policy's first turn against the labels and target crops of ``rows``; percent, area 0 to 1."""
    records = []
    for policy, trajectories in policies.items():
        requests = [done.crops for done in trajectories]
        found = cdp_diagnostics(rows["label"][:], requests, rows["target_crops"][:], relaxed_iou)
        records.append({"policy": policy, **{k: v if k in PLAIN else 100 * v for k, v in found.items()}})
    return pd.DataFrame(records)


def format_table(policies: Mapping[str, Sequence[Trajectory]]) -> pd.DataFrame:
    """Table 9: the format of each policy's calls, in percent of its *attempted* calls (nan without any).

    ``valid``: exact format; ``corrupt`` = ``recoverable`` (read with tolerance) + ``incorrect`` (malformed).
    """
    records = []
    for policy, trajectories in policies.items():
        counts = [sum(done.call_status == status for done in trajectories) for status in CALL_STATUSES]
        valid, recovered, malformed = (100 * _ratio(count, sum(counts)) for count in counts)
        records.append((policy, valid, recovered + malformed, recovered, malformed, sum(counts), len(trajectories)))
    columns = ["system", "valid", "corrupt", "recoverable", "incorrect", "calls", "n"]
    return pd.DataFrame(records, columns=columns)


# The operating curve: accuracy and tokens as functions of the bias on the call token


def sweep_call_bias(
    engine: Any, rows: Dataset, own: Sequence[Trajectory], call_bias: float, biases: Sequence[float]
) -> dict[float, list[Trajectory]]:
    """The trajectories of a policy on ``rows`` at each of ``biases``, equal to those of `Engine.run`.

    ``own``: the policy's run on these rows at ``call_bias``. A bias only decides whether the first token is the call
    token, so a row has at most two trajectories: ``own`` has one, and the engine runs the other if a bias needs it.
    AwaresError for trajectories whose first turn was forced (``call_gap`` is None).
    """
    own_calls = [_calls(done, call_bias) for done in own]
    choices = {bias: [_calls(done, bias) for done in own] for bias in biases}
    known = dict(zip(enumerate(own_calls), own, strict=True))  # (row, whether it begins with the call token)
    for call, forcing in ((False, -FORCING_BIAS), (True, FORCING_BIAS)):
        needed = {index for wanted in choices.values() for index, choice in enumerate(wanted) if choice is call}
        missing = sorted(needed - {index for index, choice in enumerate(own_calls) if choice is call})
        part = rows.select(missing)
        fresh = engine.run(part["image"], part["question"], call_bias=forcing, row_ids=part["id"])
        known |= {(index, call): done for index, done in zip(missing, fresh, strict=True)}
    return {bias: [known[key] for key in enumerate(wanted)] for bias, wanted in choices.items()}


def _calls(done: Trajectory, bias: float) -> bool:
    if done.call_gap is None:
        raise AwaresValueError(f"row {done.row_id}: no call_gap, its first turn was forced: run the row unforced")
    return done.call_gap + bias > 0


def operating_curve(
    system: str, rows: Dataset, runs: Mapping[float, Sequence[Trajectory]], evaluation: Evaluation
) -> pd.DataFrame:
    """Accuracy and tokens of the ``runs`` of `sweep_call_bias`, one line per bias, ascending.

    Columns system, call_bias, accuracy, accuracy_low, accuracy_high (percent, averaged over benchmarks as in Table 1),
    rtr, call_rate (percent of rows with crops), n.
    """
    records = []
    for bias, trajectories in sorted(runs.items()):
        average = _main_row(system, AVERAGE, scored(system, rows, trajectories), evaluation)
        calls = 100 * float(np.mean([bool(done.crops) for done in trajectories]))
        records.append({**average, "call_bias": bias, "call_rate": calls})
    columns = ["system", "call_bias", "accuracy", "accuracy_low", "accuracy_high", "rtr", "call_rate", "n"]
    return pd.DataFrame(records)[columns]


def save_trajectories(path: Path, trajectories: Sequence[Trajectory]) -> None:
    """One JSON line per row. ``seconds`` is written as 0, so that equal answers are equal bytes for DVC."""
    write_records(path, [{**done.to_dict(), "seconds": 0.0} for done in trajectories])


def load_trajectories(path: Path) -> list[Trajectory]:
    """The trajectories that `save_trajectories` wrote; AwaresError for a missing file."""
    if not path.is_file():
        raise AwaresFileError(f"{path}: no trajectories here; run the stage that writes them (`dvc repro`)")
    return [Trajectory.from_dict(record) for record in read_records(path)]
