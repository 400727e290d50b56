"""Many questions to one policy: a folder of images or a JSONL file in, one JSON line per row out, resumable.

A line of the results is a `Trajectory` with ``image``, ``question`` and the ``settings`` of the run; a row that
cannot be run has ``error`` instead. The file alone says which rows are done: after a kill at any moment the same call
resumes.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import datasets
from PIL.Image import Image
from pydantic import BaseModel, StringConstraints, ValidationError
from tqdm import tqdm

from awares.engine import jsonl
from awares.engine.images import cap, open_image
from awares.engine.jsonl import Record
from awares.errors import AwaresError, AwaresFileError, AwaresValueError, Failure, first_fault, with_failures
from awares.method.protocol import check_question
from awares.method.rollout import ImageSource, Trajectory

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # taken from a folder, case aside
CHUNK = 64  # rows: the most that a kill can cost
Text = Annotated[str, StringConstraints(strict=True, pattern=r"\S")]


class Line(BaseModel):
    """What a line of a JSONL file needs; other keys, such as those of the row schema, are ignored."""

    id: Text
    image: Text
    question: Text


@dataclass(frozen=True)
class Item:
    """One row. ``image``: its name in the results; ``load`` gives it or its path; ``error``: why the row cannot run."""

    row_id: str
    image: str
    question: str
    load: Callable[[], ImageSource]
    error: str = ""


@dataclass(frozen=True)
class Summary:
    """Counts of rows; ``errors`` includes those of an earlier run."""

    rows: int
    ran: int
    done_before: int
    errors: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.ran} run now, {self.done_before} done before, {self.errors} with an error"


def read_items(source: Path, question: str | None = None) -> list[Item]:
    """The rows of a folder (every image in it, by name) or of a JSONL file; ``question``: for rows without their own.

    A bad row becomes an item with ``error``. AwaresError for no row, no question for a folder, or a repeated id.
    """
    if source.is_dir():
        if question is None:
            raise AwaresValueError(f"{source}: a folder of images needs a question")
        paths = sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGES and path.is_file())
        items = [Item(path.name, path.name, question, lambda path=path: path) for path in paths]  # type: ignore[misc]
    elif source.is_file():
        lines = enumerate(source.read_bytes().split(b"\n"), start=1)
        items = [_item(source, number, line, question) for number, line in lines if line.strip()]
    else:
        raise AwaresFileError(f"{source}: no such file")
    if not items:
        raise AwaresValueError(f"{source}: no {'image' if source.is_dir() else 'row'} in it")
    row_id, count = Counter(item.row_id for item in items).most_common(1)[0]
    if count > 1:
        raise AwaresValueError(f"{source}: id {row_id} appears {count} times; every row needs its own")
    return items


def dataset_items(rows: datasets.Dataset) -> list[Item]:
    """Rows of the row schema as items; images are decoded when their turn comes."""
    return [
        Item(row["id"], row["id"], row["question"], lambda index=index: rows[index]["image"])  # type: ignore[misc]
        for index, row in enumerate(rows.remove_columns("image"))
    ]


def _item(file: Path, number: int, line: bytes, question: str | None) -> Item:
    row: dict[str, Any] = {"id": f"{file.stem}-{number}", "question": question}
    fault = ""
    try:
        row |= json.loads(line)
        Line.model_validate(row)
    except ValidationError as error:
        fault = first_fault(error)
    except (ValueError, TypeError, RecursionError) as error:
        fault = f"not a JSON object ({error}); write image and question"
    row_id, image, text = (str(row.get(key) or "") for key in ("id", "image", "question"))
    return Item(row_id, image, text, lambda: file.parent / image, fault and f"{file.name}, line {number}: {fault}")


def run(
    items: Sequence[Item], out: Path, engine: Any, settings: dict[str, Any], size: int = CHUNK, retry: bool = False
) -> Summary:
    """Run every item that ``out`` does not hold yet, ``size`` rows at a time, and append the results to it.

    ``settings``: plain values that decide the answers, ``call_bias`` among them; a file with others is refused.
    ``retry``: rows that ended in an error are run again. AwaresError for a file of something else, or that another
    process writes.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with jsonl.exclusive_lock(out):
        done = _done(items, out, settings, retry)
        todo = [item for item in items if item.row_id not in done]
        before = len(items) - len(todo)
        with tqdm(total=len(items), initial=before, unit="row", disable=None) as bar:  # None: shown on a terminal
            for start in range(0, len(todo), size):
                fresh = _answers(engine, todo[start : start + size], settings)
                jsonl.append_records(out, fresh)
                done |= {record["row_id"]: record for record in fresh}
                bar.update(len(fresh))
    return Summary(len(items), len(todo), before, sum("error" in done[item.row_id] for item in items))


def trajectories(out: Path, ids: Iterable[str]) -> list[Trajectory]:
    """The results in ``out`` for the rows ``ids``, in their order; AwaresError for a row that ended in an error."""
    records = {record["row_id"]: record for record in jsonl.read_records(out)}
    known, found = [one.name for one in fields(Trajectory)], []
    for row_id in ids:
        record = records[row_id]
        if "error" in record:
            raise AwaresValueError(f"{out}: row {row_id} could not be run ({record['error']})")
        found.append(Trajectory.from_dict({key: record[key] for key in known if key in record}))
    return found


def _done(items: Sequence[Item], out: Path, settings: dict[str, Any], retry: bool) -> dict[str, Record]:
    """The lines that count, by row; a torn last line and errors that are to be run again are removed from the file."""
    jsonl.refuse_foreign(out, b'{"row_id": ', "results")
    jsonl.drop_torn_line(out)
    records, wanted, kept = jsonl.read_records(out), {item.row_id: item for item in items}, []
    for record in records:
        item = wanted.get(record["row_id"])
        same = item is None or (record["image"], record["question"]) == (item.image, item.question)
        if "error" in record and (retry or not same):
            continue
        if not same:
            raise AwaresFileError(f"{out}: row {record['row_id']} has another image or question: give another file")
        if record["settings"] != settings:
            other = {
                key: record["settings"].get(key) for key in settings if record["settings"].get(key) != settings[key]
            }
            raise AwaresFileError(f"{out}: holds results of other settings ({other}): give another file")
        kept.append(record)
    if len(kept) < len(records):
        jsonl.write_records(out, kept)
    return {record["row_id"]: record for record in kept}


def _answers(engine: Any, chunk: Sequence[Item], settings: dict[str, Any]) -> list[Record]:
    """One record for each item, in order; the fault of a row goes into its record and costs no other row."""
    ready: dict[str, Image] = {}
    found: dict[str, dict[str, Any]] = {}
    for item in chunk:
        try:
            if item.error:
                raise AwaresValueError(item.error)
            check_question(item.question)
            image = open_image(item.load(), f"row {item.row_id}")
            ready[item.row_id] = cap(image, engine.max_side)  # at once, so that a chunk of large ones fits in memory
        except AwaresError as error:
            found[item.row_id] = {"error": str(error)}
    opened = [item for item in chunk if item.row_id in ready]
    ids = [item.row_id for item in opened]

    def answer(places: list[int]) -> list[Trajectory]:
        rows = [opened[place] for place in places]
        images, names = [ready[item.row_id] for item in rows], [item.row_id for item in rows]
        return engine.run(images, [item.question for item in rows], call_bias=settings["call_bias"], row_ids=names)

    for row_id, done in zip(ids, with_failures(ids, answer), strict=True):
        found[row_id] = {"error": done.reason} if isinstance(done, Failure) else done.to_dict()
    heads = [{"row_id": item.row_id, "image": item.image, "question": item.question} for item in chunk]
    return [{**head, "settings": settings, **found[head["row_id"]]} for head in heads]
