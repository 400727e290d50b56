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
from IPython.display import HTML

from awares.config import Params, read_yaml
from awares.errors import AwaresFileError, Failure
from awares.method.crops import coverage, union_area
from awares.method.judges import Judge, right_at
from awares.study.diagnostics import NO_CALL, known, outcome

if TYPE_CHECKING:
    from awares.method.rollout import Trajectory

AVERAGE = "average"
ALL_SOURCES = "all sources"


def save_table(table: pd.DataFrame, path: Path, digits: int = 4) -> pd.DataFrame:
    """Write ``table`` as csv, numbers rounded to ``digits``, and return it as written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = table.round(digits)
    rounded.to_csv(path, index=False, lineterminator="\n")
    return rounded


def save_metrics(values: Mapping[str, Any], path: Path, digits: int = 6) -> dict[str, Any]:
    """Write (nested) numbers as json for ``dvc metrics``, nan as null, and return them as plain rounded numbers."""
    plain = _plain(values, digits, math.nan)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(values, digits, None), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return plain


def _plain(value: Any, digits: int, nothing: float | None) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, digits, nothing) for key, inner in value.items()}
    if value is None or math.isnan(value):
        return nothing
    return int(value) if isinstance(value, int | np.integer) else round(float(value), digits)


def table(frame: pd.DataFrame, digits: int = 2) -> HTML:
    """A data frame as a notebook shows it: no index, numbers rounded."""
    return HTML(frame.to_html(index=False, border=0, float_format=lambda value: f"{value:.{digits}f}", na_rep="-"))


def wide(long: pd.DataFrame, value: str) -> pd.DataFrame:
    """A long table (first two columns: names) with one line per second name and one column per first name, to read."""
    columns, index = long.columns[:2]
    table = long.pivot(index=index, columns=columns, values=value).loc[long[index].unique(), long[columns].unique()]
    return table.rename_axis(columns=None).reset_index()


# Curated rows


def pick(rows: datasets.Dataset, n: int, **wanted: Any) -> datasets.Dataset:
    """The first ``n`` rows whose columns have the ``wanted`` values."""
    columns = [zip(rows[name], [value] * len(rows), strict=True) for name, value in wanted.items()]
    fits = [all(found == value for found, value in pairs) for pairs in zip(*columns, strict=True)]
    return rows.select([index for index, fit in enumerate(fits) if fit][:n])


def label_metrics(rows: datasets.Dataset) -> dict[str, float]:
    """Of curated rows: how many, the percentage of HR ones, and the mean area of their target crops (0 to 1)."""
    areas = [union_area(names) for names in rows["target_crops"] if names]
    return {"rows": len(rows), "hr": 100 * len(areas) / len(rows), "area": float(np.mean(areas)) if areas else math.nan}


def label_table(rows: datasets.Dataset) -> pd.DataFrame:
    """Percentages of LR and HR rows per source and over all. Columns source, lr, hr, n."""
    labels = pd.DataFrame({"source": rows["source"][:], "hr": [name == "HR" for name in rows["label"]]})
    parts = [*labels.groupby("source", sort=False), (ALL_SOURCES, labels)]
    shares = [(source, 100 * part.hr.mean(), len(part)) for source, part in parts]
    return pd.DataFrame([(source, 100 - hr, hr, n) for source, hr, n in shares], columns=["source", "lr", "hr", "n"])


def crop_table(rows: datasets.Dataset) -> pd.DataFrame:
    """How often the HR rows of a source, and of all, ask for each crop (percent). Columns source, crop, share, n."""
    requests = pd.DataFrame({"source": rows["source"][:], "crop": [outcome(names) for names in rows["target_crops"]]})
    requests = requests[requests.crop != NO_CALL]
    parts = [*requests.groupby("source", sort=False), (ALL_SOURCES, requests)]
    records = [
        (source, name, 100 * (part.crop == name).mean() if len(part) else 0.0, len(part))
        for source, part in parts
        for name in known(requests.crop)[1:]
    ]
    return pd.DataFrame(records, columns=["source", "crop", "share", "n"])


def evidence_table(rows: datasets.Dataset, params: Params) -> pd.DataFrame:
    """One line per curated row: source, label, image width and height (px), height (shorter side of its smallest evidence box, px of the full
    image), and whether the deciding judge calls the answers right: half, full (not of released rows, which come without answers).

    A row without boxes of its own counts with the oracle's; one that has neither (an LR row of a public dataset) has height nan.
    """
    judge = params.curation.judge
    passed = right_at(judge, params)
    sides = {"half": "low", "full": "high"} if not params.curation.released else {}
    scores = {view: rows[f"{side}_score_{judge}"][:] for view, side in sides.items()}
    records = []
    for index, row in enumerate(rows):
        own = row["answer_boxes"] or row["question_boxes"]
        boxes = own or row.get("oracle_answer_boxes") or row.get("oracle_question_boxes") or []
        width, height = row["image"].size
        spans = [min((box[2] - box[0]) * width, (box[3] - box[1]) * height) / 1000 for box in boxes]
        record = {"source": row["source"], "label": row["label"], "image width": width, "image height": height}
        right = {view: values[index] >= passed for view, values in scores.items()}
        records.append({**record, "height": min(spans, default=math.nan), **right})
    return pd.DataFrame(records)


def accuracy_by_size(evidence: pd.DataFrame, parts: int = 4) -> pd.DataFrame:
    """Percent right at half and full resolution over equal parts of the rows by evidence size, the smallest first. Only rows with boxes count.

    Empty without answers of a base model, and where no LR row has boxes: a HR row's label says which answers are right.
    """
    columns = ["height min", "height max", "n", "half", "full"]
    evidence = evidence.dropna(subset="height")
    if not {"half", "full"} <= set(evidence) or not (evidence.label == "LR").any():
        return pd.DataFrame(columns=columns)
    groups = evidence.groupby(pd.qcut(evidence.height.rank(method="first"), min(parts, len(evidence)), labels=False))
    sizes = {"height min": ("height", "min"), "height max": ("height", "max"), "n": ("height", "size")}
    table = groups.agg(**sizes, half=("half", "mean"), full=("full", "mean"))
    return table.assign(half=100 * table.half, full=100 * table.full).reset_index(drop=True)


def judged(rows: datasets.Dataset, repaired: Sequence["Trajectory | Failure"], judge: Judge) -> pd.DataFrame:
    """Percent of curated rows, by label and over all, that ``judge`` calls right from half, full, half+crops.

    ``repaired``: the base model's answers from the half-resolution view with the target crops. Columns label, n, lost (rows left out,
    for want of such an answer or of a usable score), half, full, half+crops.
    """
    answered = {index: one.answer for index, one in enumerate(repaired) if not isinstance(one, Failure)}
    labels, rows = rows["label"][:], rows.select(list(answered))
    answers = {"half": rows["low_answer"][:], "full": rows["high_answer"][:], "half+crops": list(answered.values())}
    right = {"label": rows["label"][:]}
    for view, given in answers.items():
        scores = np.array(judge.scores(rows["question"][:], given, rows["answers"][:]))
        right[view] = np.where(np.isnan(scores), math.nan, 100.0 * (scores >= judge.right_at))
    table = pd.DataFrame(right).dropna()
    parts = {"HR": table[table.label == "HR"], "LR": table[table.label == "LR"], "all": table}
    found = pd.DataFrame(
        [{"label": name, "n": len(part), **part[list(answers)].mean()} for name, part in parts.items()]
    )
    found.insert(2, "lost", [labels.count("HR"), labels.count("LR"), len(labels)] - found.n)
    return found


def missed_evidence(rows: datasets.Dataset, threshold: float) -> float:
    """Percent of the HR rows with boxes of their own whose target crops show less than ``threshold`` of one of them; nan without such."""
    missed = [
        any(coverage(box, names) < threshold for box in [*question, *answer])
        for question, answer, names in zip(
            rows["question_boxes"], rows["answer_boxes"], rows["target_crops"], strict=True
        )
        if names and (question or answer)
    ]
    return 100 * float(np.mean(missed)) if missed else math.nan


def hyperparameters(params: Params) -> pd.DataFrame:
    """Table 11 for this profile: every parameter of the two trainings but where they run, as params.yaml gives it. Columns parameter, sft, grpo."""
    values, written = params.as_dict(), read_yaml(params.path("params.yaml"))
    sections = [part[stage] for stage in ("sft", "grpo") for part in (written, written["profiles"][params.profile])]
    names = [name for name in dict.fromkeys(name for section in sections for name in section) if name != "launch"]
    cells = {
        stage: [str(values[stage][name]) if name in values[stage] else "" for name in names]
        for stage in ("sft", "grpo")
    }
    return pd.DataFrame({"parameter": names, **cells})


# Seeds, metrics, checks


def seed_table(params: Params, seed: int) -> pd.DataFrame:
    """table1_main.csv of the run with training ``seed``, plus a column seed."""
    file = replace(params, seed=seed).run_dir("evaluation") / "tables" / "table1_main.csv"
    if not file.is_file():
        raise AwaresFileError(f"{file}: seed {seed} has not been evaluated; run `dvc repro seeds`")
    return pd.read_csv(file).assign(seed=seed)


def seed_means(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, smallest (``_low``) and largest (``_high``) accuracy and RTR over seeds, per system and benchmark."""
    groups = runs.groupby(["system", "benchmark"], sort=False)
    columns = {
        f"{name}{suffix}": (name, how)
        for name in ("accuracy", "rtr")
        for suffix, how in (("", "mean"), ("_low", "min"), ("_high", "max"))
    }
    return groups.agg(**columns, seeds=("seed", "nunique")).reset_index()


def load_metrics(folder: Path) -> dict[str, Any]:
    """What :func:`save_metrics` wrote to ``folder``/metrics.json; nan comes back as None."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


# check -> (sense, bound). What the embedded suite, its base model and the policies are asked for.
CHECKS: dict[str, tuple[str, float]] = {
    "full resolution, average (%)": (">=", 85.0),
    "full resolution, weakest task (%)": (">=", 75.0),
    "full less half resolution, average (points)": (">=", 15.0),
    "full less half where the evidence is large (points)": ("<=", 3.0),
    "full less half with the oracle's crops (points)": ("<=", 2.0),
    "HR rows, at least (%)": (">=", 15.0),
    "HR rows, at most (%)": ("<=", 40.0),
    "crops that no row needs": ("<=", 0.0),
    "mean area of the target crops": ("<=", 0.45),
    "no image less the most frequent answer, worst task (points)": ("<=", 5.0),
    "LR/HR from the words (area under the ROC curve)": ("<=", 0.70),
    "crop from the words less the most frequent crop (points)": ("<=", 10.0),
    "full less AwaRes, average (points)": ("<=", 1.5),
    "RTR of AwaRes": ("<=", 0.45),
    "RTR of SFT only less that of AwaRes": (">=", 0.0),
    "valid calls of AwaRes (%)": (">=", 99.0),
}


def check_table(tables: Path, metrics: Mapping[str, Any]) -> pd.DataFrame:
    """``CHECKS`` against the published tables: check, value, sense, bound, holds (False where nothing was found)."""
    names = ("table1_main", "reading", "oracle_repair", "no_image", "leaks", "table9_format")
    read = {name: pd.read_csv(tables / f"{name}.csv") for name in names}
    return _verdicts(CHECKS, [*_suite_values(read, metrics), *_policy_values(read)])


# What the trained policies are asked for over training seeds. Either the rows on what GRPO saves hold, or the one on
# the oracle frontier does. On unseen rows the same is asked for within the interval: the row of its lower end decides, the one
# above it says where the mean lies.
SEED_CHECKS: dict[str, tuple[str, float]] = {
    "full less AwaRes, mean over seeds (points)": ("<=", 1.5),
    "RTR of AwaRes, mean over seeds": ("<=", 0.45),
    "valid calls of AwaRes, weakest seed (%)": (">=", 99.0),
    "RTR of SFT only less that of AwaRes, mean over seeds": (">=", 0.0),
    "AwaRes less SFT only, upper end of the interval (points)": (">=", 0.0),
    "RTR of SFT only less what its oracle frontier pays for its accuracy": ("<=", 0.03),
    "full less AwaRes on unseen rows, mean over seeds (points)": ("<=", 1.5),
    "full less AwaRes on unseen rows, lower end of the interval (points)": ("<=", 1.5),
    "RTR of AwaRes on unseen rows, mean over seeds": ("<=", 0.45),
    "RTR of SFT only less that of AwaRes on unseen rows, mean over seeds": (">=", 0.0),
    "AwaRes less SFT only on unseen rows, upper end of the interval (points)": (">=", 0.0),
}


def seed_checks(
    means: pd.DataFrame,
    paired: pd.DataFrame,
    forms: pd.DataFrame,
    frontier: pd.DataFrame,
    unseen: pd.DataFrame,
    unseen_paired: pd.DataFrame,
) -> pd.DataFrame:
    """``SEED_CHECKS`` as :func:`check_table` gives them.

    ``means``: :func:`seed_means`. ``paired``: `evaluation.compare` of (awares, sft) and (awares, full), each row's scores averaged over
    seeds. ``forms``: table9_format.csv of all seeds. ``frontier``: frontier.csv of the main seed. ``unseen``, ``unseen_paired``: as
    ``means`` and ``paired``, of rows that no stage has seen.
    """
    average, fresh = (
        table[table.benchmark == AVERAGE].set_index("system")[["accuracy", "rtr"]] for table in (means, unseen)
    )
    gain, unseen_gain = (table.set_index(["a", "b"]).loc["awares"] for table in (paired, unseen_paired))
    cold = frontier.set_index("policy").loc["sft"]
    values = [
        average.accuracy["full"] - average.accuracy["awares"],
        average.rtr["awares"],
        forms[forms.system == "awares"].valid.min(),
        average.rtr["sft"] - average.rtr["awares"],
        gain.high["sft"],
        cold.rtr - cold.rtr_at_accuracy,
        fresh.accuracy["full"] - fresh.accuracy["awares"],
        -unseen_gain.high["full"],
        fresh.rtr["awares"],
        fresh.rtr["sft"] - fresh.rtr["awares"],
        unseen_gain.high["sft"],
    ]
    return _verdicts(SEED_CHECKS, values)


def _verdicts(checks: Mapping[str, tuple[str, float]], values: Sequence[Any]) -> pd.DataFrame:
    records = []
    for (check, (sense, bound)), value in zip(checks.items(), values, strict=True):
        number = math.nan if value is None else float(value)
        holds = number >= bound if sense == ">=" else number <= bound
        records.append((check, number, sense, bound, holds))
    return pd.DataFrame(records, columns=["check", "value", "sense", "bound", "holds"])


def _suite_values(read: Mapping[str, pd.DataFrame], metrics: Mapping[str, Any]) -> list[Any]:
    main = read["table1_main"].pivot(index="benchmark", columns="system", values="accuracy")
    repair = read["oracle_repair"].set_index("label").loc["all"]
    large = read["reading"].query("evidence == 'large'").set_index("view").accuracy
    leaks, labels = read["leaks"].set_index("check"), metrics["curation"]["train"]
    where = leaks.value.get("where", math.nan) - leaks.bound.get("where", math.nan) + 10
    return [
        main.full[AVERAGE],
        main.full.min(),
        main.full[AVERAGE] - main.half[AVERAGE],
        large.full - large.half,
        repair.full - repair["half+crops"],
        labels["hr"],
        labels["hr"],
        metrics["crop_distribution"]["unused_crops"],
        labels["area"],
        read["no_image"].gain.max(),
        leaks.value.get("when"),
        where,
    ]


def _policy_values(read: Mapping[str, pd.DataFrame]) -> list[Any]:
    average = read["table1_main"].query("benchmark == @AVERAGE").set_index("system")
    valid = read["table9_format"].set_index("system").valid
    return [
        average.accuracy["full"] - average.accuracy["awares"],
        average.rtr["awares"],
        average.rtr["sft"] - average.rtr["awares"],
        valid["awares"],
    ]
