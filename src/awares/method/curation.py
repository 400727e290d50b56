"""Curation without human labels (PAPER §2): base answers at both resolutions -> judge -> oracle -> target crops.

Each step writes its raw output, one JSON line per row: ``answers.jsonl``, ``verdicts.jsonl``, ``oracle.jsonl``. A step
works in chunks of rows and writes each chunk at once. After a kill the unfinished chunk is repeated, so that a resumed
run writes the same bytes as an undisturbed one. The result is the row schema plus verdicts, label and target crops.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from awares.config import Params
from awares.engine import answer_match
from awares.engine.jsonl import Record, in_chunks, write_records
from awares.engine.keys import checkpoint_folder, code_of
from awares.engine.rows import FEATURES, load_rows, rows_digest, save_rows
from awares.errors import AwaresValueError, Failure, with_failures
from awares.method import judges, metrics, rollout
from awares.method.crops import CropRule, boxes_to_crops
from awares.method.judges import HR, TIE, Judge, Oracle, build_judge, label

RAW_FILES = ("answers.jsonl", "verdicts.jsonl", "oracle.jsonl")
LOST_FILE = "lost.jsonl"  # rows without a label: id, step, reason
ROWS_FOLDER = "dataset"  # the curated rows, next to the raw files

Records = Sequence[Sequence[Record]]  # those of the three steps


def curate(
    rows: Mapping[str, Dataset],
    engine: Any,
    judges: Sequence[str | Callable[..., Any] | Judge],
    oracle: Oracle,
    params: Params,
    out_dir: str | Path,
    work_dir: str | Path | None = None,
    ready: Callable[..., None] = lambda *names: None,
    judge: str | Callable[..., Any] | Judge | None = None,
    rule: CropRule | None = None,
) -> dict[str, Dataset]:
    """Label and locate every row; write raw outputs and curated rows to ``out_dir/<split>``; return the rows by split.

    ``rows``: by split. A step runs on all splits before the next one, and each judge on all rows before the next judge,
    so that one model at a time is needed. ``engine``: the base model's `rollout.Engine`. ``judges``: names, functions
    or `Judge` objects; all verdicts are recorded, and ``judge`` (default: ``curation.judge``) decides. ``rule``: the
    crop rule (default: ``crops.rule``).
    Columns added: ``low_answer``, ``high_answer``; ``verdict``, ``label`` (LR or HR) and ``both_wrong`` of the deciding
    judge; ``verdict_<judge>``, ``low_score_<judge>``, ``high_score_<judge>``; ``oracle_question_boxes``,
    ``oracle_answer_boxes`` and ``target_crops``, empty on LR rows. Lost rows are dropped, and so are rows with two
    wrong answers if ``curation.drop_both_wrong``. Unfinished work is in ``work_dir`` (default: ``out_dir``), keyed by
    its inputs: the same call resumes after a kill and retries rows without a server's answer.
    ``ready`` is called before the first row of a step, with the name of its model and those of the steps after it, and
    may raise. AwaresError before any work for unusable rows, judges or boxes.
    """
    for part in rows.values():
        if missing := set(FEATURES) - set(part.column_names) or not len(part):
            raise AwaresValueError(f"curation: {f'rows lack {missing}' if len(part) else 'empty, there are no rows'}")
        oracle.check(part)
    built = {one.name: one for one in (build_judge(one, params) for one in (*judges, *([judge] if judge else [])))}
    decides = list(built)[-1] if judge else params.curation.judge
    if decides not in built:
        raise AwaresValueError(f"curation.judge {decides!r} is not among the judges {', '.join(built)}")
    given = params, Path(work_dir or out_dir), (params.curation.engine, *built, oracle.name), cache(ready)
    steps = {split: _Steps(part, *given) for split, part in rows.items()}
    answers = {split: _answer(one, engine) for split, one in steps.items()}
    verdicts = {split: [{"id": one["id"]} for one in part if "reason" not in one] for split, part in answers.items()}
    for each in built.values():
        for split, one in steps.items():
            judged = zip(verdicts[split], _judge(one, answers[split], each), strict=True)
            verdicts[split] = [old | new for old, new in judged]
    for split, one in steps.items():
        located = _locate(one, answers[split], verdicts[split], oracle, decides)
        records, folder = (answers[split], verdicts[split], located), Path(out_dir) / split
        for name, found in zip((*RAW_FILES, LOST_FILE), (*records, lost_rows(records, decides)), strict=True):
            write_records(folder / name, found)
        save_rows(assemble(rows[split], records, params, decides, rule), folder / ROWS_FOLDER)
    return {split: load_rows(Path(out_dir) / split / ROWS_FOLDER) for split in rows}


def base_answers(rows: Dataset, engine: Any, view: str) -> list[Any]:
    """The base model's answers from ``view`` (half, full, half+crops: with target crops); `Failure` for a lost row."""

    def ask(places: list[int]) -> list[Any]:
        part = rows.select(places)
        chosen = [tuple(names) for names in part["target_crops"]] if view == "half+crops" else None
        return engine.answer(list(part["image"]), list(part["question"]), view, chosen, row_ids=list(part["id"]))

    return with_failures(list(rows["id"]), ask)


class _Steps:
    """Runs steps on chunks of rows; the records of a step are keyed by its inputs and those of the steps before it."""

    def __init__(self, dataset: Dataset, params: Params, home: Path, models: Sequence[str], ready: Any) -> None:
        self.dataset, self.params, self.home, self.models, self.ready = dataset, params, home, models, ready
        self.place = {row_id: index for index, row_id in enumerate(dataset["id"])}
        self.inputs: Record = {"rows": rows_digest(dataset), "chunk_rows": params.curation.chunk_rows}

    def step(self, name: str, model: str, ids: list[str], key: Record, work: Any, images: bool = True) -> list[Record]:
        """The records of ``work``, called on chunks of the rows ``ids``, for which ``model`` is needed."""
        self.inputs |= key
        folder = checkpoint_folder(self.home / name, {"stage": f"curation {name}", **self.inputs})
        rows = self.dataset if images else self.dataset.remove_columns("image")

        def records(chunk: list[str]) -> list[Record]:
            self.ready(*self.models[self.models.index(model) :])
            fresh = work(rows.select([self.place[row_id] for row_id in chunk]))
            return [{"id": row_id, **record} for row_id, record in zip(chunk, fresh, strict=True)]

        def unanswered(record: Record) -> bool:  # by a server: the chunk is repeated
            return any(part.get("silent") for part in (record, *record.values()) if isinstance(part, dict))

        return in_chunks(folder / name, ids, self.params.curation.chunk_rows, records, unanswered)


def _answer(steps: _Steps, engine: Any) -> list[Record]:
    """Step 1: the base model's answers on I_low and on I, or a ``reason``; no times, which differ between runs."""

    def record(*sides: Any) -> Record:
        if failures := [side for side in sides if isinstance(side, Failure)]:
            return {"reason": failures[0].reason, "silent": any(side.silent for side in failures)}
        low, high = ({k: v for k, v in side.to_dict().items() if k != "seconds"} for side in sides)
        return {"low": low, "high": high}

    def work(chunk: Dataset) -> list[Record]:
        return list(map(record, base_answers(chunk, engine, "half"), base_answers(chunk, engine, "full")))

    key = {"engine": engine.key(crops=False), "code": rollout.code()}
    return steps.step(RAW_FILES[0], steps.models[0], list(steps.place), key, work)


def _judge(steps: _Steps, answers: list[Record], judge: Judge) -> list[Record]:
    """Step 2: the verdicts of ``judge`` on every answered row, with raw scores."""
    answered = {record["id"]: record for record in answers if "reason" not in record}

    def work(chunk: Dataset) -> list[Record]:
        lows, highs = ([answered[row_id][side]["answer"] for row_id in chunk["id"]] for side in ("low", "high"))
        found = judge.judge(list(chunk["question"]), lows, highs, list(chunk["answers"]), list(chunk["id"]))
        return [{judge.name: asdict(verdict)} for verdict in found]

    code = code_of(*(str(module.__file__) for module in (judges, metrics, answer_match)))
    key: Record = {"judged_by": judge.key(), "judge_code": code, "answered": _digest(answered)}
    return steps.step(RAW_FILES[1], judge.name, list(answered), key, work, images=False)


def _locate(steps: _Steps, answers: list[Record], verdicts: list[Record], oracle: Oracle, judge: str) -> list[Record]:
    """Step 3: the oracle on the rows that are HR."""
    margin, answered = steps.params.curation.lucky_margin, {record["id"]: record for record in answers}
    wanted = [one["id"] for one in verdicts if row_label(answered[one["id"]], one[judge], margin) == HR]
    boxes = zip(*(steps.dataset[name] for name in ("id", "question_boxes", "answer_boxes")), strict=True)
    key = {"judge": judge, "lucky_margin": margin, "wanted": _digest(wanted), "boxes": _digest(map(json.dumps, boxes))}
    key |= {"oracle": oracle.key(), "oracle_code": code_of(__file__)}

    def work(chunk: Dataset) -> list[Record]:
        return oracle.locate(list(chunk))

    return steps.step(RAW_FILES[2], oracle.name, wanted, key, work, images=oracle.looks)


def lost_rows(records: Records, judge: str) -> list[Record]:
    """Rows without both answers, a verdict of ``judge`` or a box: id, step (base, judge or oracle), reason."""
    answers, verdicts, located = records
    lost = [("base", record["id"], record["reason"]) for record in answers if "reason" in record]
    lost += [("judge", one["id"], one[judge]["reason"]) for one in verdicts if one[judge]["value"] is None]
    lost += [("oracle", record["id"], record["reason"]) for record in located if record.get("reason")]
    return [{"id": row_id, "step": step, "reason": reason} for step, row_id, reason in lost]


def assemble(dataset: Dataset, records: Records, params: Params, judge: str, rule: CropRule | None = None) -> Dataset:
    """The curated rows from the records of the three steps, columns as in `curate`; ``judge`` decides the labels."""
    lost = {record["id"] for record in lost_rows(records, judge)}
    answered, verdicts, boxes = ({record["id"]: record for record in found} for found in records)
    empty: Record = {"question_boxes": [], "answer_boxes": []}
    columns = {}
    for row_id, verdict in verdicts.items():
        decided = verdict[judge]
        if row_id in lost or (params.curation.drop_both_wrong and decided["both_wrong"]):
            continue
        answer, found = answered[row_id], boxes.get(row_id, empty)
        row: Record = {"low_answer": answer["low"]["answer"], "high_answer": answer["high"]["answer"]}
        row |= {"verdict": decided["value"], "label": row_label(answer, decided, params.curation.lucky_margin)}
        row["both_wrong"] = decided["both_wrong"]
        for name in [key for key in verdict if key != "id"]:
            value, low, high = (verdict[name][key] for key in ("value", "low", "high"))
            row |= {f"verdict_{name}": value, f"low_score_{name}": low, f"high_score_{name}": high}
        row |= {f"oracle_{name}": found[name] for name in empty}
        evidence = [box for name in empty for box in found[name]]
        columns[row_id] = row | {"target_crops": list(boxes_to_crops(evidence, params.crops, rule))}
    if not columns:
        dropped = f"{len(dataset) - len(lost)} dropped (curation.drop_both_wrong)"
        raise AwaresValueError(
            f"curation leaves no row: {len(lost)} of {len(dataset)} lost (see {LOST_FILE}), {dropped}"
        )
    kept = dataset.select([place for place, row_id in enumerate(dataset["id"]) if row_id in columns])
    added = Dataset.from_list(list(columns.values()), features=_features(next(iter(columns.values()))))
    return concatenate_datasets([kept.select_columns(list(FEATURES)), added], axis=1)


def _features(names: Iterable[str]) -> Features:
    """Types by column name, because inference fails on empty lists and on scores that are whole numbers."""
    text, boxes = Value("string"), FEATURES["question_boxes"]
    types: Record = {"low_answer": text, "high_answer": text, "label": text, "both_wrong": Value("bool")}
    types |= {"oracle_question_boxes": boxes, "oracle_answer_boxes": boxes, "target_crops": List(text)}
    verdict, score = Value("int8"), Value("float64")
    return Features({name: types.get(name, verdict if name.startswith("verdict") else score) for name in names})


def row_label(answers: Record, verdict: Record, lucky_margin: float) -> str:
    """LR or HR of one row (PAPER §2) from its two answers and the deciding verdict; "" without a usable verdict.

    Departure from the paper: if both answers are correct, but only the half-resolution one has a margin below
    ``lucky_margin`` (nats between the two best tokens, smallest over the answer), it was lucky, and the row is HR.
    ``lucky_margin`` 0 is the paper's rule.
    """
    if verdict["value"] is None:
        return ""
    both_correct = verdict["value"] == TIE and not verdict["both_wrong"]
    lucky = both_correct and answer_margin(answers, "low") < lucky_margin <= answer_margin(answers, "high")
    return HR if lucky else label(verdict["value"])


def answer_margin(answers: Record, side: str) -> float:
    """The smallest logit margin of one answer, in nats; infinite for an answer without logits (from a server)."""
    return answers[side].get("margin", math.inf)


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
