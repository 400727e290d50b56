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
    served = registry.judge.builtin.get(name) == registry.SERVED
    local = name in registry.judge and not served
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
    records = []
    for name in [key for key in (verdicts[0] if verdicts else {}) if key != "id"]:
        found = [record[name] for record in verdicts if "forward" in record[name]]
        pairs = [(one["forward"], one["swapped"]) for one in found if one["value"] is not None]
        if not found:
            continue
        leaning = [(f == LOW_BETTER) + (s == HIGH_BETTER) - (f == HIGH_BETTER) - (s == LOW_BETTER) for f, s in pairs]
        marks = pd.DataFrame(
            {"same": [f == s for f, s in pairs], "first": [x > 0 for x in leaning], "second": [x < 0 for x in leaning]}
        )
        records.append((name, len(pairs), *(100 * marks.mean()), len(found) - len(pairs)))
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
    columns = ["at_least", "below", "half", "full", "hr", "n"]
    if not edges:
        return pd.DataFrame(columns=columns)
    judge = params.curation.judge
    threshold = correct_threshold(judge, params)
    margins = {record["id"]: answer_margin(record, "low") for record in answers if "reason" not in record}
    table = pd.DataFrame(
        {
            "margin": [margins[row_id] for row_id in curated["id"]],
            "half": np.array(curated[f"low_score_{judge}"][:], float) >= threshold,
            "full": np.array(curated[f"high_score_{judge}"][:], float) >= threshold,
            "hr": [name == HR for name in curated["label"]],
        }
    )
    records = []
    for low, high in itertools.pairwise([*edges, math.inf]):
        part = table[(table.margin >= low) & (table.margin < high)]
        records.append((low, high, *(100 * float(part[name].mean()) for name in ("half", "full", "hr")), len(part)))
    return pd.DataFrame(records, columns=columns)


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
    sizes = {row["id"]: "large" if _lowest_box(row) > LEGIBLE_AT_HALF else "small" for row in rows}
    sized = scores.assign(evidence=scores.row_id.map(sizes))
    records = []
    for view, part in sized.groupby("system", sort=False):
        for name in ("small", "large", "all"):
            group = part if name == "all" else part[part.evidence == name]
            records.append((view, name, 100 * group.score.mean(), len(group)))
    return pd.DataFrame(records, columns=["view", "evidence", "accuracy", "n"])


def _lowest_box(row: Record) -> float:
    """Height of the row's lowest evidence box, in px of the full image; infinite without boxes."""
    height = row["image"].size[1]
    heights = [(box[3] - box[1]) * height / 1000 for box in [*row["question_boxes"], *row["answer_boxes"]]]
    return min(heights, default=math.inf)
