"""Curation without human labels (PAPER §2): base answers at both resolutions -> judge -> oracle -> trajectories.

Every step keeps its raw output, one JSON line per row: ``answers.jsonl``, ``verdicts.jsonl``, ``oracle.jsonl``. A
step runs in chunks of rows; a chunk is written at once, and a chunk that was torn by a kill is done again whole, so
that a resumed run ends with the very bytes of an undisturbed one. The result is the row schema plus judgement, label
and target crops: what a trajectory is made of (`protocol.messages` renders it).
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch

from awares.config import Params
from awares.data.rows import validate_rows
from awares.engine import answer_match as wording
from awares.engine import decode, model
from awares.engine.jsonl import Record, in_chunks, write_records
from awares.engine.rows import FEATURES, load_rows, save_rows
from awares.errors import AwaresValueError, Failure, with_failures
from awares.method import crops, judges, metrics, protocol, rollout
from awares.method.judges import HR, LR, TIE, Judge, label
from awares.training import checkpoints as training

RAW_FILES = ("answers.jsonl", "verdicts.jsonl", "oracle.jsonl")
LOST_FILE = "lost.jsonl"  # rows without a label: id, step, reason
ROWS = "dataset"  # folder of the curated rows, beside the raw files

Boxes = list[list[int]]


# Oracles


class Oracle(ABC):
    """Tells where the evidence of a row lies. ``looks``: whether it wants the image decoded."""

    name: str
    looks = True

    @abstractmethod
    def locate(self, rows: Sequence[Record]) -> list[Record]:
        """Of each row ``question_boxes`` and ``answer_boxes``, [x1, y1, x2, y2] in 0-1000, at least one in all; or none at all and a
        ``reason``.
        """

    @abstractmethod
    def key(self) -> str:
        """Everything that decides a box, for keying stored boxes."""

    def check(self, rows: datasets.Dataset) -> None:
        """AwaresError for a row that this oracle cannot serve, before any work is done. By default it serves all."""
        return None


class AnnotationOracle(Oracle):
    """The boxes that the rows carry, each edge moved by a normal error of ``sigma`` thousandths of the image side, then out by ``margin``.

    The error is drawn from ``seed`` and the row's id alone, so that a row always gets the same one.
    """

    name = "annotation"
    looks = False

    def __init__(self, seed: int, sigma: float, margin: int = 0) -> None:
        self.seed, self.sigma, self.margin = seed, sigma, margin

    def locate(self, rows: Sequence[Record]) -> list[Record]:
        return [self._locate(row) for row in rows]

    def _locate(self, row: Record) -> Record:
        name = int.from_bytes(hashlib.sha256(row["id"].encode()).digest()[:8], "big")
        rng = np.random.default_rng([self.seed, name])
        return {key: [self._moved(box, rng) for box in row[key]] for key in ("question_boxes", "answer_boxes")}

    def _moved(self, box: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Still a box of at least one unit a side, inside the image."""
        edges = np.rint(np.asarray(box) + rng.normal(0.0, self.sigma, 4)).astype(int)
        spans = [
            [low - self.margin, high + self.margin] for low, high in (sorted(edges[[0, 2]]), sorted(edges[[1, 3]]))
        ]
        (left, right), (top, bottom) = np.clip(spans, 0, 1000).tolist()
        left, top = min(left, 999), min(top, 999)
        return [left, top, max(right, left + 1), max(bottom, top + 1)]

    def key(self) -> str:
        return f"{self.name}:{self.seed}:{self.sigma}:{self.margin}"

    def check(self, rows: datasets.Dataset) -> None:
        boxes = zip(rows["id"], rows["question_boxes"], rows["answer_boxes"], strict=True)
        for row_id, question, answer in boxes:
            if not question and not answer:
                raise AwaresValueError(
                    f"row {row_id} has no question_boxes and no answer_boxes: the oracle `annotation` needs them "
                    "(curation.oracle)"
                )


# The pipeline


def curate(
    dataset: datasets.Dataset,
    engine: Any,
    panel: Sequence[Judge],
    oracle: Oracle,
    params: Params,
    out_dir: str | Path,
    work_dir: str | Path | None = None,
    ready: Callable[[tuple[str, ...]], None] = lambda names: None,
) -> datasets.Dataset:
    """Label and locate every row of ``dataset``; write raw outputs and curated rows to ``out_dir``; return the rows.

    ``panel``: the judges whose verdicts are recorded; the one named ``curation.judge`` decides. ``engine``: the base
    model's `rollout.Engine`. Columns added to the row schema: ``low_answer``, ``high_answer``; ``verdict``, ``label``
    (LR or HR) and ``both_wrong`` by the deciding judge; ``verdict_<judge>``, ``low_score_<judge>``,
    ``high_score_<judge>``; on HR rows (empty on LR ones) ``oracle_question_boxes``, ``oracle_answer_boxes`` and
    ``target_crops``. With ``curation.drop_both_wrong`` rows that both answers got wrong are left out. Work in
    progress stands in ``.checkpoints`` in ``work_dir`` (beside ``out_dir`` if not given), keyed by its inputs: the same
    call after a kill goes on from there, asks again about the rows that a server was silent about, and about no others; one that
    changes the labels alone asks the base model nothing. ``ready`` is called before the first row of a step, with the names of the
    models still needed, and may raise (`served.require_servers`). AwaresError before any work for rows, judges or boxes that cannot do.
    """
    validate_rows(dataset, "curation", pixels=False)
    oracle.check(dataset)
    if params.curation.judge not in [judge.name for judge in panel]:
        raise AwaresValueError(f"curation.judge {params.curation.judge!r} is not on the panel of judges")
    names = params.curation.engine, *[judge.name for judge in panel], oracle.name
    work = _Work(dataset, params, Path(out_dir).parent if work_dir is None else Path(work_dir), names, ready)
    answers = work.answers(engine)
    verdicts = work.verdicts(answers, panel)
    located = work.locate(answers, verdicts, oracle)
    for name, records in zip(RAW_FILES, (answers, verdicts, located), strict=True):
        write_records(Path(out_dir) / name, records)
    write_records(Path(out_dir) / LOST_FILE, lost_rows(answers, verdicts, located, params.curation.judge))
    save_rows(assemble(dataset, answers, verdicts, located, params), Path(out_dir) / ROWS)
    return load_rows(Path(out_dir) / ROWS)


def base_answers(rows: datasets.Dataset, engine: Any, view: str) -> list[Any]:
    """What the base model answers from ``view`` (half, full, or half+crops: with the target crops); a `Failure` where its server would not."""

    def ask(places: list[int]) -> list[Any]:
        part = rows.select(places)
        chosen = [tuple(names) for names in part["target_crops"]] if view == "half+crops" else None
        return engine.answer(list(part["image"]), list(part["question"]), view, chosen, row_ids=list(part["id"]))

    return with_failures(list(rows["id"]), ask)


class _Work:
    """The three steps on one set of rows. Each step's folder is keyed by all that decides its output."""

    def __init__(
        self,
        rows: datasets.Dataset,
        params: Params,
        home: Path,
        models: tuple[str, ...],
        ready: Callable[[tuple[str, ...]], None],
    ) -> None:
        self.rows, self.params, self.home = rows, params, home
        self.models, self.ready = models, functools.cache(ready)  # the base model, the judges, the oracle
        self.ids: list[str] = list(rows["id"])
        self.inputs: Record = {
            "rows": training.rows_digest(rows),
            "chunk_rows": params.curation.chunk_rows,
            "code": _code(rollout, decode, protocol, crops, model),
        }

    def answers(self, engine: Any) -> list[Record]:
        """Step 1: the base model on I_low and on I, or a ``reason``. Times are left out: they would differ from run to run."""
        self.inputs["engine"] = engine_key(engine)

        def work(chunk: datasets.Dataset) -> list[Record]:

            def record(row_id: str, low: Any, high: Any) -> Record:
                lost = [side for side in (low, high) if isinstance(side, Failure)]
                if lost:
                    return {"id": row_id, "reason": lost[0].reason, "silent": any(side.silent for side in lost)}
                return {"id": row_id, "low": _timeless(low), "high": _timeless(high)}

            sides = base_answers(chunk, engine, "half"), base_answers(chunk, engine, "full")
            return [record(*row) for row in zip(chunk["id"], *sides, strict=True)]

        return self._step(RAW_FILES[0], self.ids, work, self.models)

    def verdicts(self, answers: list[Record], panel: Sequence[Judge]) -> list[Record]:
        """Step 2: every judge on every answered row, raw scores kept."""
        by_id = {record["id"]: record for record in answers if "reason" not in record}
        self.inputs |= {"judges": [judge.key() for judge in panel], "judge_code": _code(judges, metrics, wording)}
        self.inputs["answered"] = _digest(by_id)

        def work(chunk: datasets.Dataset) -> list[Record]:
            lows, highs = ([by_id[row_id][side]["answer"] for row_id in chunk["id"]] for side in ("low", "high"))
            fresh: list[Record] = [{"id": row_id} for row_id in chunk["id"]]
            for judge in panel:
                found = judge.judge(list(chunk["question"]), lows, highs, list(chunk["answers"]), list(chunk["id"]))
                for record, verdict in zip(fresh, found, strict=True):
                    record[judge.name] = asdict(verdict)
            return fresh

        return self._step(RAW_FILES[1], list(by_id), work, self.models[1:], images=False)

    def locate(self, answers: list[Record], verdicts: list[Record], oracle: Oracle) -> list[Record]:
        """Step 3: the oracle on the rows that are HR."""
        judge, lucky = self.params.curation.judge, self.params.curation.lucky_margin
        self.inputs |= {
            "judge": judge,
            "lucky_margin": lucky,
            "oracle": oracle.key(),
            "oracle_code": training.code_of(__file__),
        }
        answered = {record["id"]: record for record in answers}
        wanted = [one["id"] for one in verdicts if row_label(answered[one["id"]], one[judge], lucky) == HR]
        self.inputs["wanted"] = _digest(wanted)
        boxes = zip(self.ids, self.rows["question_boxes"], self.rows["answer_boxes"], strict=True)
        self.inputs["boxes"] = _digest(json.dumps(row) for row in boxes)  # what the annotation oracle reads

        def work(chunk: datasets.Dataset) -> list[Record]:
            found = oracle.locate(list(chunk))
            return [{"id": row_id, **record} for row_id, record in zip(chunk["id"], found, strict=True)]

        return self._step(RAW_FILES[2], wanted, work, self.models[-1:], images=oracle.looks)

    def _step(
        self,
        name: str,
        ids: list[str],
        work: Callable[[datasets.Dataset], list[Record]],
        needed: tuple[str, ...],
        images: bool = True,
    ) -> list[Record]:
        """``work`` on chunks of the rows ``ids``, again on those with a row that a server was silent about. ``needed``: the models
        of this step and of those to come; ``images=False`` spares decoding them.
        """
        folder = training.checkpoint_folder(self.home / name, {"stage": f"curation {name}", **self.inputs})
        rows = self.rows if images else self.rows.remove_columns("image")
        place = {row_id: index for index, row_id in enumerate(self.ids)}
        size = self.params.curation.chunk_rows

        def worked(chunk: list[str]) -> list[Record]:
            self.ready(needed)
            return work(rows.select([place[row] for row in chunk]))

        return in_chunks(folder / name, ids, size, worked, _unanswered)


def _unanswered(record: Record) -> bool:
    """Whether a server was silent about the row: the next run asks again."""
    return any(part.get("silent") for part in (record, *record.values()) if isinstance(part, dict))


def assemble(
    dataset: datasets.Dataset, answers: list[Record], verdicts: list[Record], located: list[Record], params: Params
) -> datasets.Dataset:
    """The curated rows from the raw outputs of the three steps, columns as `curate` says; lost rows are left out."""
    judge, boxes = params.curation.judge, {record["id"]: record for record in located}
    lost = {record["id"] for record in lost_rows(answers, verdicts, located, judge)}
    if len(lost) == len(dataset):
        raise AwaresValueError(f"curation leaves no row: all {len(dataset)} are lost; {LOST_FILE} tells why")
    dataset = dataset.select([index for index, record in enumerate(answers) if "reason" not in record])
    answers = [record for record in answers if "reason" not in record]
    empty: Record = {"question_boxes": [], "answer_boxes": []}
    columns: dict[str, list[Any]] = {
        "low_answer": [record["low"]["answer"] for record in answers],
        "high_answer": [record["high"]["answer"] for record in answers],
        "verdict": [record[judge]["value"] for record in verdicts],
        "label": [
            row_label(answer, record[judge], params.curation.lucky_margin)
            for answer, record in zip(answers, verdicts, strict=True)
        ],
        "both_wrong": [record[judge]["both_wrong"] for record in verdicts],
    }
    for name in [key for key in verdicts[0] if key != "id"]:
        columns[f"verdict_{name}"] = [record[name]["value"] for record in verdicts]
        columns[f"low_score_{name}"] = [record[name]["low"] for record in verdicts]
        columns[f"high_score_{name}"] = [record[name]["high"] for record in verdicts]
    found = [boxes.get(row_id, empty) for row_id in dataset["id"]]
    columns["oracle_question_boxes"] = [record["question_boxes"] for record in found]
    columns["oracle_answer_boxes"] = [record["answer_boxes"] for record in found]
    columns["target_crops"] = [target_crops(record, params) for record in found]
    added = datasets.Dataset.from_dict(columns, features=_features(columns))
    rows = datasets.concatenate_datasets([dataset.select_columns(list(FEATURES)), added], axis=1)
    dropped = columns["both_wrong"] if params.curation.drop_both_wrong else [False] * len(rows)
    kept = [
        i for i, (row_id, wrong) in enumerate(zip(rows["id"], dropped, strict=True)) if row_id not in lost and not wrong
    ]
    if not kept:
        raise AwaresValueError(
            f"curation leaves no row: {len(lost)} lost ({LOST_FILE} tells why), the others dropped, because both answers "
            "are wrong (curation.drop_both_wrong)"
        )
    return rows if len(kept) == len(rows) else rows.select(kept)


def lost_rows(
    answers: Sequence[Record], verdicts: Sequence[Record], located: Sequence[Record], judge: str
) -> list[Record]:
    """The rows without both answers, a usable verdict of the deciding judge or a usable box: id, step (base, judge or
    oracle), reason.
    """
    unanswered = [
        {"id": record["id"], "step": "base", "reason": record["reason"]} for record in answers if "reason" in record
    ]
    unjudged = [
        {"id": record["id"], "step": "judge", "reason": record[judge]["reason"]}
        for record in verdicts
        if record[judge]["value"] is None
    ]
    unlocated = [
        {"id": record["id"], "step": "oracle", "reason": record["reason"]} for record in located if record.get("reason")
    ]
    return unanswered + unjudged + unlocated


def row_label(answers: Record, verdict: Record, lucky_margin: float) -> str:
    """LR or HR of one row (PAPER §2) from its two answers and the deciding judge's verdict; "" without a usable one.

    Beyond the paper: where both answers are right, the half-resolution one with less than ``lucky_margin`` (nats) between its two best
    tokens somewhere and the full one with as much or more everywhere, the former was luck, and the row is HR. 0: the paper's rule.
    """
    if verdict["value"] is None:
        return ""
    right = verdict["value"] == TIE and not verdict["both_wrong"]
    lucky = right and _margin(answers, "low") < lucky_margin <= _margin(answers, "high")
    return HR if lucky else label(verdict["value"])


def _margin(answers: Record, side: str) -> float:
    """Of one answer, in nats; endless where it came from elsewhere, without."""
    return answers[side].get("margin", math.inf)


def luck_table(
    answers: Sequence[Record], curated: datasets.Dataset, edges: Sequence[float], params: Params
) -> pd.DataFrame:
    """How far an answer's margin tells whether it is right: one line per range of the half-resolution answer's margin (nats).

    ``answers``: the raw records of `curate`. Columns at_least, below, half and full (percent right by the deciding judge), hr (percent
    labelled HR), n.
    """
    columns = ["at_least", "below", "half", "full", "hr", "n"]
    if not edges:
        return pd.DataFrame(columns=columns)
    judge = params.curation.judge
    passed = judges.right_at(judge, params)
    margins = {record["id"]: _margin(record, "low") for record in answers if "reason" not in record}
    table = pd.DataFrame(
        {
            "margin": [margins[row_id] for row_id in curated["id"]],
            "half": np.array(curated[f"low_score_{judge}"][:], float) >= passed,
            "full": np.array(curated[f"high_score_{judge}"][:], float) >= passed,
            "hr": [name == HR for name in curated["label"]],
        }
    )
    records = []
    for low, high in itertools.pairwise([*edges, math.inf]):
        part = table[(table.margin >= low) & (table.margin < high)]
        right = [100 * float(part[view].mean()) for view in ("half", "full")]
        records.append((low, high, *right, 100 * float(part.hr.mean()), len(part)))
    return pd.DataFrame(records, columns=columns)


def target_crops(record: Record, params: Params) -> list[str]:
    """C* of one row (PAPER §2.2): the crops for the box around its question and answer boxes; none without boxes."""
    parts = [*record["question_boxes"], *record["answer_boxes"]]
    if not parts:
        return []
    section = params.crops
    chosen = crops.boxes_to_crops(
        crops.box_union(parts), section.rule, section.iou_threshold, section.coverage_threshold, parts, section.offered
    )
    return list(chosen)


def _features(columns: dict[str, Any]) -> datasets.Features:
    """Types by name, so that an empty list or a whole score does not decide the type of a column."""
    kinds: dict[str, Any] = {
        "low_answer": datasets.Value("string"),
        "high_answer": datasets.Value("string"),
        "label": datasets.Value("string"),
        "both_wrong": datasets.Value("bool"),
        "oracle_question_boxes": FEATURES["question_boxes"],
        "oracle_answer_boxes": FEATURES["answer_boxes"],
        "target_crops": datasets.List(datasets.Value("string")),
    }
    other = {name: datasets.Value("int8" if name.startswith("verdict") else "float64") for name in columns}
    return datasets.Features({name: kinds.get(name, other[name]) for name in columns})


# How far the judges agree (Tables 2 and 10)


def judge_names(curated: datasets.Dataset) -> list[str]:
    """The judges whose verdicts ``curated`` holds."""
    return [name.removeprefix("verdict_") for name in curated.column_names if name.startswith("verdict_")]


def judge_agreement(curated: datasets.Dataset) -> pd.DataFrame:
    """Table 2 for every pair of judges, in percent of rows: the confusion matrix of their labels, and its diagonal.

    Columns judge_a, judge_b, agreement, lr_lr, lr_hr, hr_lr, hr_hr (a's label first), kappa (-1 to 1, nan where one
    judge gives one label only and both agree), n.
    """
    rows = []
    for a, b in combinations(judge_names(curated), 2):
        pairs = zip(curated[f"verdict_{a}"], curated[f"verdict_{b}"], strict=True)
        both = [(label(x), label(y)) for x, y in pairs if x is not None and y is not None]
        left, right = np.array(both).reshape(-1, 2).T
        cells = [float(np.mean((left == x) & (right == y))) for x in (LR, HR) for y in (LR, HR)]
        same, chance = cells[0] + cells[3], (cells[0] + cells[1]) * (cells[0] + cells[2])
        chance += (cells[2] + cells[3]) * (cells[1] + cells[3])
        kappa = (same - chance) / (1 - chance) if chance < 1 else float("nan")
        rows.append((a, b, 100 * same, *(100 * cell for cell in cells), kappa, len(left)))
    columns = ["judge_a", "judge_b", "agreement", "lr_lr", "lr_hr", "hr_lr", "hr_hr", "kappa", "n"]
    return pd.DataFrame(rows, columns=columns)


def label_shares(curated: datasets.Dataset) -> pd.DataFrame:
    """Per judge the percentage of rows of each verdict and label. Columns judge, tie, low_better, high_better, lr,
    hr, n.
    """
    rows = []
    for name in judge_names(curated):
        found = np.array([value for value in curated[f"verdict_{name}"] if value is not None])
        tie, low, high = (100 * float(np.mean(found == value)) for value in (0, 1, 2))
        rows.append((name, tie, low, high, tie + low, high, len(found)))
    return pd.DataFrame(rows, columns=["judge", "tie", "low_better", "high_better", "lr", "hr", "n"])


# Keys


def engine_key(engine: Any) -> str:
    """What decides an engine's answers: its own ``key()`` if it has one, else a hash of the weights and its limits."""
    if hasattr(engine, "key"):
        return str(engine.key())
    digest = hashlib.sha256()
    for name, weight in sorted(engine.decoder.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    limits = (engine.decoder.max_new_tokens, engine.token_budget, engine.max_side)
    weights = engine.decoder.model
    numbers = (str(weights.dtype), weights.device.type, torch.get_num_threads())
    versions = tuple(importlib.metadata.version(name) for name in training.LIBRARIES)
    return f"{digest.hexdigest()}:{limits}:{numbers}:{versions}"


def _digest(ids: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def _code(*modules: Any) -> str:
    return training.code_of(*(module.__file__ for module in modules))


def _timeless(trajectory: Any) -> Record:
    values = trajectory.to_dict()
    values.pop("seconds", None)
    return values
