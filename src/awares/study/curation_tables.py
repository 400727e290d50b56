"""Tables about curated rows: labels, target crops, judges (Tables 2 and 10), evidence and whether it was read."""

import itertools
import math
from collections.abc import Sequence

import datasets
import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from awares.config import Params
from awares.engine.jsonl import Record
from awares.engine.rows import picture_sizes
from awares.errors import Failure
from awares.method.crops import union_area
from awares.method.judges import HIGH_BETTER, HR, LOW_BETTER, LR, Judge, build_judge, label
from awares.method.rollout import Trajectory
from awares.study.diagnostics import evidence_boxes, shows

LEGIBLE_AT_HALF = 24.0  # px of the full image: the suite's large evidence is higher, its small evidence lower


def judge_names(curated: datasets.Dataset) -> list[str]:
    """The judges whose verdicts ``curated`` holds."""
    return [name.removeprefix("verdict_") for name in curated.column_names if name.startswith("verdict_")]


def judge_agreement(curated: datasets.Dataset) -> pd.DataFrame:
    """Table 2 by pair of judges: agreement and confusion matrix (a's label first), percent; Cohen's kappa or nan; n."""
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
    """Order effects on served judges (percent): judge, n, same verdict, first or second preferred, lost (number)."""
    records, lean = [], {LOW_BETTER: 1, HIGH_BETTER: -1}
    for name in [key for key in (verdicts[0] if verdicts else {}) if key != "id"]:
        found = [record[name] for record in verdicts if "forward" in record[name]]
        pairs = [(one["forward"], one["swapped"]) for one in found if one["value"] is not None]
        if any(one["swapped"] is not None for one in found):  # compared in both orders
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


def answers_correct(curated: datasets.Dataset, params: Params) -> pd.DataFrame:
    """Whether the deciding judge accepts the base model's answers (served judges: a score of 1). Columns half, full."""
    judge, sides = params.curation.judge, {"half": "low", "full": "high"}
    scores = {view: np.array(curated[f"{side}_score_{judge}"][:], float) for view, side in sides.items()}
    return pd.DataFrame(scores) >= build_judge(judge, params).correct_threshold


def label_metrics(rows: datasets.Dataset) -> dict[str, float]:
    """Number of curated rows, percentage of HR rows, and mean area of their target crops (0 to 1)."""
    areas = [union_area(names) for names in rows["target_crops"] if names]
    return {"rows": len(rows), "hr": 100 * len(areas) / len(rows), "area": float(np.mean(areas)) if areas else math.nan}


def label_table(rows: datasets.Dataset) -> pd.DataFrame:
    """Percentages of LR and HR rows per source and over all. Columns source, lr, hr, n."""
    labels = pd.DataFrame({"source": rows["source"][:], "hr": 100.0 * (np.array(rows["label"][:]) == HR)})
    groups = pd.concat([labels, labels.assign(source="all sources")]).groupby("source", sort=False).hr
    table = groups.agg(hr="mean", n="size").reset_index()
    table.insert(1, "lr", 100 - table.hr)
    return table


def repair_table(rows: datasets.Dataset, repaired: Sequence[Trajectory | Failure], judge: Judge) -> pd.DataFrame:
    """Percent of curated rows that ``judge`` accepts by view (``repaired``: half+crops): label, n, lost, the views."""
    answers = {index: one.answer for index, one in enumerate(repaired) if not isinstance(one, Failure)}
    known, marks = rows.select(list(answers)), pd.DataFrame({"label": rows["label"][:]})
    views = {"half": known["low_answer"][:], "full": known["high_answer"][:], "half+crops": list(answers.values())}
    for view, given in views.items():
        scores = np.array(judge.scores(known["question"][:], given, known["answers"][:]))
        marks.loc[list(answers), view] = 100.0 * np.where(np.isnan(scores), scores, scores >= judge.correct_threshold)
    marks = pd.concat([marks, marks.assign(label="all")])
    complete, labels = marks.notna().all(axis=1), pd.Categorical(marks.label, [HR, LR, "all"])
    marks = marks.assign(label=labels, n=complete, lost=~complete)
    counts = marks.groupby("label", observed=False)[["n", "lost"]].sum()
    return counts.join(marks[complete].groupby("label", observed=False)[list(views)].mean()).reset_index()


def missed_evidence(rows: datasets.Dataset, threshold: float) -> float:
    """Percent of HR rows with boxes whose target crops cover less than ``threshold`` of a box; nan without rows."""
    pairs = zip(rows["target_crops"], evidence_boxes(rows), strict=True)
    missed = [not shows(crops, boxes, threshold) for crops, boxes in pairs if crops and boxes]
    return 100 * float(np.mean(missed)) if missed else math.nan


def reading_table(scores: pd.DataFrame, rows: datasets.Dataset) -> pd.DataFrame:
    """Percent correct: view, evidence (of `evidence_sizes`, or all), accuracy, n."""
    sizes, records = evidence_sizes(rows), []
    for view, part in scores.groupby("system", sort=False):
        evidence = part.row_id.map(sizes)
        for name in ("small", "large", "all"):
            group = part.score if name == "all" else part.score[evidence == name]
            records.append((view, name, 100 * group.mean(), len(group)))
    return pd.DataFrame(records, columns=["view", "evidence", "accuracy", "n"])


def evidence_sizes(rows: datasets.Dataset) -> pd.Series:
    """Row id -> "small" (a box of at most LEGIBLE_AT_HALF px) or "large"."""
    pairs = zip(picture_sizes(rows, max_side=10**6), evidence_boxes(rows), strict=True)
    lowest = [min(((box[3] - box[1]) * side / 1000 for box in boxes), default=math.inf) for (_, side), boxes in pairs]
    return pd.Series(np.where(np.array(lowest) > LEGIBLE_AT_HALF, "large", "small"), rows["id"][:])
