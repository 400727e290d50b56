"""Tables: how they are saved and shown, and what the curated rows say (reports/<profile>/tables)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pandas as pd

from awares.config import Params, read_yaml
from awares.errors import AwaresFileError, Failure
from awares.method.crops import coverage, union_area
from awares.method.judges import Judge
from awares.study.curation_tables import correct_threshold
from awares.study.diagnostics import NO_CALL, OUTCOMES, outcome, outcome_shares

if TYPE_CHECKING:
    from awares.method.rollout import Trajectory


def save_table(table: pd.DataFrame, path: Path, digits: int = 4) -> pd.DataFrame:
    """Write ``table`` as CSV, numbers rounded to ``digits``, and return it as written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = table.round(digits)
    rounded.to_csv(path, index=False, lineterminator="\n")
    return rounded


def save_metrics(values: Mapping[str, Any], path: Path, digits: int = 6) -> dict[str, Any]:
    """Write (nested) numbers as JSON for ``dvc metrics``, nan as null, and return them as plain rounded numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(values, digits, None), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return _plain(values, digits, math.nan)


def _plain(value: Any, digits: int, nothing: float | None) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, digits, nothing) for key, inner in value.items()}
    if value is None or math.isnan(value):
        return nothing
    return int(value) if isinstance(value, int | np.integer) else round(float(value), digits)


def load_metrics(folder: Path) -> dict[str, Any]:
    """The numbers that :func:`save_metrics` wrote to ``folder``/metrics.json; nan comes back as None."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def wide(long: pd.DataFrame, value: str) -> pd.DataFrame:
    """A long table (its first two columns are names) with one line per second name and one column per first name."""
    columns, index = long.columns[:2]
    table = long.pivot(index=index, columns=columns, values=value).loc[long[index].unique(), long[columns].unique()]
    return table.rename_axis(columns=None).reset_index()


def first_rows(rows: datasets.Dataset, n: int, **wanted: Any) -> datasets.Dataset:
    """The first ``n`` rows whose columns have the ``wanted`` values."""
    columns = rows.select_columns(list(wanted)).to_pandas()
    return rows.select(np.flatnonzero((columns == pd.Series(wanted)).all(axis=1))[:n])


def label_metrics(rows: datasets.Dataset) -> dict[str, float]:
    """Number of curated rows, percentage of HR rows, and mean area of their target crops (0 to 1)."""
    areas = [union_area(names) for names in rows["target_crops"] if names]
    return {"rows": len(rows), "hr": 100 * len(areas) / len(rows), "area": float(np.mean(areas)) if areas else math.nan}


def label_table(rows: datasets.Dataset) -> pd.DataFrame:
    """Percentages of LR and HR rows per source and over all. Columns source, lr, hr, n."""
    labels = pd.DataFrame({"source": rows["source"][:], "hr": [name == "HR" for name in rows["label"]]})
    shares = [(source, 100 * part.hr.mean(), len(part)) for source, part in _by_source(labels)]
    return pd.DataFrame([(source, 100 - hr, hr, n) for source, hr, n in shares], columns=["source", "lr", "hr", "n"])


def crop_table(rows: datasets.Dataset) -> pd.DataFrame:
    """How often the HR rows of a source, and of all, request each crop (percent). Columns source, crop, share, n."""
    requests = pd.DataFrame({"source": rows["source"][:], "crop": [outcome(names) for names in rows["target_crops"]]})
    groups = [(source, part.crop.tolist()) for source, part in _by_source(requests[requests.crop != NO_CALL])]
    return pd.DataFrame(outcome_shares(groups, OUTCOMES[1:]), columns=["source", "crop", "share", "n"])


def _by_source(table: pd.DataFrame) -> list[tuple[Any, pd.DataFrame]]:
    return [*table.groupby("source", sort=False), ("all sources", table)]


def evidence_table(rows: datasets.Dataset, params: Params) -> pd.DataFrame:
    """One line per curated row: source, label, image width and height, height of the evidence (px of the full image).

    Columns half and full: whether the deciding judge accepts these answers (released rows have none). The evidence is
    the smallest annotated box, else the oracle's smallest, on its shorter side; without boxes height is nan.
    """
    records = []
    for row in rows:
        own = row["answer_boxes"] or row["question_boxes"]
        boxes = own or row.get("oracle_answer_boxes") or row.get("oracle_question_boxes") or []
        width, height = row["image"].size
        spans = [min((box[2] - box[0]) * width, (box[3] - box[1]) * height) / 1000 for box in boxes]
        records.append((row["source"], row["label"], width, height, min(spans, default=math.nan)))
    table = pd.DataFrame(records, columns=["source", "label", "image width", "image height", "height"])
    judge = params.curation.judge
    for view, side in {} if params.curation.released else {"half": "low", "full": "high"}.items():
        table[view] = np.array(rows[f"{side}_score_{judge}"][:], float) >= correct_threshold(judge, params)
    return table


def accuracy_by_size(evidence: pd.DataFrame, parts: int = 4) -> pd.DataFrame:
    """Percent right at half and full resolution in equal parts of the rows with boxes, the smallest evidence first.

    Empty without answers of a base model and where only HR rows have boxes: their label says which answers are right.
    """
    evidence = evidence.dropna(subset="height")
    if not {"half", "full"} <= set(evidence) or not (evidence.label == "LR").any():
        return pd.DataFrame(columns=["height min", "height max", "n", "half", "full"])
    groups = evidence.groupby(pd.qcut(evidence.height.rank(method="first"), min(parts, len(evidence)), labels=False))
    sizes = {"height min": ("height", "min"), "height max": ("height", "max"), "n": ("height", "size")}
    table = groups.agg(**sizes, half=("half", "mean"), full=("full", "mean"))
    return table.assign(half=100 * table.half, full=100 * table.full).reset_index(drop=True)


def repair_table(rows: datasets.Dataset, repaired: Sequence["Trajectory | Failure"], judge: Judge) -> pd.DataFrame:
    """Percent of curated rows, by label and over all, that ``judge`` accepts from half, full, half+crops.

    ``repaired``: the base model's answers from the half-resolution view with the target crops. Columns label, n, lost
    (rows without such an answer or a usable score), half, full, half+crops.
    """
    answered = {index: one.answer for index, one in enumerate(repaired) if not isinstance(one, Failure)}
    labels, rows = rows["label"][:], rows.select(list(answered))
    answers = {"half": rows["low_answer"][:], "full": rows["high_answer"][:], "half+crops": list(answered.values())}
    right = {"label": rows["label"][:]}
    for view, given in answers.items():
        scores = np.array(judge.scores(rows["question"][:], given, rows["answers"][:]))
        right[view] = np.where(np.isnan(scores), math.nan, 100.0 * (scores >= judge.correct_threshold))
    table = pd.DataFrame(right).dropna()
    records = []
    for name, part in (("HR", table[table.label == "HR"]), ("LR", table[table.label == "LR"]), ("all", table)):
        all_rows = len(labels) if name == "all" else labels.count(name)
        records.append((name, len(part), all_rows - len(part), *part[list(answers)].mean()))
    return pd.DataFrame(records, columns=["label", "n", "lost", *answers])


def missed_evidence(rows: datasets.Dataset, threshold: float) -> float:
    """Percent of HR rows with boxes whose target crops cover less than ``threshold`` of a box; nan without rows."""
    missed = []
    for row in rows.select_columns(["question_boxes", "answer_boxes", "target_crops"]):
        if row["target_crops"] and (boxes := [*row["question_boxes"], *row["answer_boxes"]]):
            missed.append(any(coverage(box, row["target_crops"]) < threshold for box in boxes))
    return 100 * float(np.mean(missed)) if missed else math.nan


def hyperparameters(params: Params) -> pd.DataFrame:
    """Table 11 for this profile, in the order of params.yaml. Columns parameter, sft, grpo."""
    values, written = params.as_dict(), read_yaml(params.path("params.yaml"))
    sections = [part[stage] for stage in ("sft", "grpo") for part in (written, written["profiles"][params.profile])]
    names = [name for name in dict.fromkeys(name for section in sections for name in section) if name != "launch"]
    cells = {stage: [str(values[stage].get(name, "")) for name in names] for stage in ("sft", "grpo")}
    return pd.DataFrame({"parameter": names, **cells})


def seed_table(params: Params, seed: int) -> pd.DataFrame:
    """table1_main.csv of the run with training ``seed``, plus a column seed."""
    file = replace(params, seed=seed).run_dir("evaluation") / "tables" / "table1_main.csv"
    if not file.is_file():
        raise AwaresFileError(f"{file}: seed {seed} has not been evaluated; run `dvc repro seeds`")
    return pd.read_csv(file).assign(seed=seed)


def seed_means(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, smallest (``_low``) and largest (``_high``) accuracy and RTR over seeds, per system and benchmark."""
    ends = {"": "mean", "_low": "min", "_high": "max"}
    columns: Any = {f"{name}{end}": (name, how) for name in ("accuracy", "rtr") for end, how in ends.items()}
    groups = runs.groupby(["system", "benchmark"], sort=False)
    return groups.agg(**columns, seeds=("seed", "nunique")).reset_index()


def check_table(checks: Sequence[tuple[str, float | None, str, float]]) -> pd.DataFrame:
    """Acceptance checks (name, value, sense ">=" or "<=", bound), with a column holds (False for nan)."""
    table = pd.DataFrame(checks, columns=["check", "value", "sense", "bound"]).astype({"value": float})
    return table.assign(holds=np.where(table.sense == ">=", table.value >= table.bound, table.value <= table.bound))
