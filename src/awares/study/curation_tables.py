"""Tables about rows and their labels: judges (Tables 2 and 10), margins, evidence size, majority answers."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import datasets
import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from awares import registry
from awares.config import Params
from awares.engine.jsonl import Record
from awares.method.curation import answer_margin
from awares.method.judges import HIGH_BETTER, HR, LOW_BETTER, LR, Judge, build_judge, label
from awares.method.metrics import score

LEGIBLE_AT_HALF = 24.0  # px of the full image: the suite's large evidence is higher, its small evidence lower


def correct_threshold(name: str, params: Params) -> float:
    """The score from which judge ``name`` calls an answer correct; 1 for served judges and for released labels."""
    local = name in registry.judge and registry.judge.builtin.get(name) != registry.SERVED
    return build_judge(name, params).correct_threshold if local else Judge.correct_threshold


def judge_names(curated: datasets.Dataset) -> list[str]:
    """The judges whose verdicts ``curated`` holds."""
    return [name.removeprefix("verdict_") for name in curated.column_names if name.startswith("verdict_")]


def judge_agreement(curated: datasets.Dataset) -> pd.DataFrame:
    """Table 2 for every pair of judges: agreement and confusion matrix of their labels, in percent of rows.

    Columns judge_a, judge_b, agreement, lr_lr, lr_hr, hr_lr, hr_hr (a's label first), kappa (Cohen's, -1 to 1; nan
    where both judges give one and the same label only), n.
    """
    records = []
    for a, b in itertools.combinations(judge_names(curated), 2):
        pairs = zip(curated[f"verdict_{a}"], curated[f"verdict_{b}"], strict=True)
        both = [(label(x), label(y)) for x, y in pairs if x is not None and y is not None]
        left, right = np.array(both).reshape(-1, 2).T
        cells = [float(np.mean((left == x) & (right == y))) for x in (LR, HR) for y in (LR, HR)]
        kappa = cohen_kappa_score(left, right) if len({*left, *right}) > 1 else math.nan
        records.append((a, b, 100 * (cells[0] + cells[3]), *(100 * cell for cell in cells), kappa, len(left)))
    columns = ["judge_a", "judge_b", "agreement", "lr_lr", "lr_hr", "hr_lr", "hr_hr", "kappa", "n"]
    return pd.DataFrame(records, columns=columns)


def order_effects(verdicts: Sequence[Record]) -> pd.DataFrame:
    """Effect of the order of the answers on each served judge of verdicts.jsonl, in percent of the rows with a verdict.

    Columns judge, n, same (one verdict in both orders), first (the answer shown first is preferred, in one order at
    least), second (likewise), lost (number of rows without a verdict).
    """
    records, lean = [], {LOW_BETTER: 1, HIGH_BETTER: -1}
    for name in [key for key in (verdicts[0] if verdicts else {}) if key != "id"]:
        found = [record[name] for record in verdicts if "forward" in record[name]]
        pairs = [(one["forward"], one["swapped"]) for one in found if one["value"] is not None]
        if found:
            leaning = np.array([lean.get(forward, 0) - lean.get(swapped, 0) for forward, swapped in pairs])
            same = np.array([forward == swapped for forward, swapped in pairs])
            shares = (100 * marks.mean() for marks in (same, leaning > 0, leaning < 0))
            records.append((name, len(pairs), *shares, len(found) - len(pairs)))
    return pd.DataFrame(records, columns=["judge", "n", "same", "first", "second", "lost"])


def label_shares(curated: datasets.Dataset) -> pd.DataFrame:
    """Percent of rows by verdict and label, per judge. Columns judge, tie, low_better, high_better, lr, hr, n."""
    records = []
    for name in judge_names(curated):
        verdicts = np.array([value for value in curated[f"verdict_{name}"] if value is not None])
        tie, low, high = (100 * float(np.mean(verdicts == value)) for value in (0, 1, 2))
        records.append((name, tie, low, high, tie + low, high, len(verdicts)))
    return pd.DataFrame(records, columns=["judge", "tie", "low_better", "high_better", "lr", "hr", "n"])


def luck_table(
    answers: Sequence[Record], curated: datasets.Dataset, edges: Sequence[float], params: Params
) -> pd.DataFrame:
    """Whether a small logit margin signals a lucky answer: one line per range of the half-resolution answer's margin.

    ``answers``: the raw records of `curate`; ``edges``: lower ends of the ranges, in nats. Columns at_least, below,
    half and full (percent correct by the deciding judge), hr (percent labelled HR), n.
    """
    records, judge = [], params.curation.judge
    if edges:
        threshold = correct_threshold(judge, params)
        margins = {record["id"]: answer_margin(record, "low") for record in answers if "reason" not in record}
        margin = np.array([margins[row_id] for row_id in curated["id"]])
        right = {
            "half": np.array(curated[f"low_score_{judge}"][:], float) >= threshold,
            "full": np.array(curated[f"high_score_{judge}"][:], float) >= threshold,
            "hr": np.array(curated["label"][:]) == HR,
        }
        table = pd.DataFrame(right)
        for low, high in itertools.pairwise([*edges, math.inf]):
            part = table[(margin >= low) & (margin < high)]
            records.append((low, high, *(100 * part.mean()), len(part)))
    return pd.DataFrame(records, columns=["at_least", "below", "half", "full", "hr", "n"])


def majority_table(rows: datasets.Dataset) -> pd.DataFrame:
    """Accuracy (percent) of each benchmark's most frequently accepted answer. Columns benchmark, answer, accuracy."""
    records = []
    pairs = pd.DataFrame({"benchmark": rows["source"][:], "accepted": rows["answers"][:]})
    for benchmark, part in pairs.groupby("benchmark", sort=False):
        counts = Counter(answer for accepted in part.accepted for answer in dict.fromkeys(accepted))
        answer = counts.most_common(1)[0][0]
        accuracy = 100 * float(np.mean([score(str(benchmark), answer, accepted) for accepted in part.accepted]))
        records.append({"benchmark": benchmark, "answer": answer, "accuracy": accuracy})
    return pd.DataFrame(records)


def reading_table(scores: pd.DataFrame, rows: datasets.Dataset) -> pd.DataFrame:
    """Percent correct by view and evidence size. Columns view, evidence (small, large, all), accuracy, n.

    ``scores``: of `evaluation.scored`, one system per view. Large: the lowest evidence box is higher than
    ``LEGIBLE_AT_HALF``; a row without boxes counts as large.
    """
    sizes, records = {}, []
    for row in rows:
        boxes, height = [*row["question_boxes"], *row["answer_boxes"]], row["image"].size[1]
        lowest = min(((box[3] - box[1]) * height / 1000 for box in boxes), default=math.inf)
        sizes[row["id"]] = "large" if lowest > LEGIBLE_AT_HALF else "small"
    for view, part in scores.groupby("system", sort=False):
        evidence = part.row_id.map(sizes)
        for name in ("small", "large", "all"):
            group = part.score if name == "all" else part.score[evidence == name]
            records.append((view, name, 100 * group.mean(), len(group)))
    return pd.DataFrame(records, columns=["view", "evidence", "accuracy", "n"])
