"""Many questions to one policy: a folder of images or a JSONL file in, one JSON line per row out, resumable.

A line of the results is a `Trajectory` with ``image``, ``question`` and the ``settings`` of the run; a row that
cannot be run has ``error`` instead. The file alone says which rows are done: after a kill the same call resumes.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from PIL.Image import Image
from pydantic import BaseModel, StringConstraints, ValidationError
from tqdm import tqdm

from awares.engine import jsonl
from awares.engine.images import cap, open_image
from awares.engine.jsonl import Record
from awares.errors import AwaresError, AwaresFileError, AwaresValueError, Failure, first_fault, with_failures
from awares.method.protocol import check_question
from awares.method.rollout import Trajectory

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # taken from a folder, case aside
ROWS_PER_WRITE = 64
Text = Annotated[str, StringConstraints(strict=True, pattern=r"\S")]


class Line(BaseModel):
    """What a line of a JSONL file needs; other keys, such as those of the row schema, are ignored."""

    id: Text
    image: Text
    question: Text


def read_batch(source: Path, question: str | None = None) -> list[Record]:
    """The rows of a folder (every image in it, by name) or of a JSONL file; ``question``: for rows without their own.

    A row has row_id, image (a path relative to the folder or to the file's folder), question, and error if it is bad.
    AwaresError for no row, no question for a folder, or a repeated id.
    """
    if source.is_dir():
        if question is None:
            raise AwaresValueError(f"{source}: a folder of images needs a question")
        names = sorted(path.name for path in source.iterdir() if path.suffix.lower() in IMAGES and path.is_file())
        rows = [{"row_id": name, "image": name, "question": question} for name in names]
    elif source.is_file():
        lines = enumerate(source.read_bytes().split(b"\n"), start=1)
        rows = [_read_line(source, number, line, question) for number, line in lines if line.strip()]
    else:
        raise AwaresFileError(f"{source}: no such file")
    row_id, count = Counter(row["row_id"] for row in rows).most_common(1)[0] if rows else ("", 0)
    if count != 1:
        fault = f"id {row_id} appears {count} times; every row needs its own" if count else "no image or row in it"
        raise AwaresValueError(f"{source}: {fault}")
    return rows


def _read_line(file: Path, number: int, line: bytes, question: str | None) -> Record:
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
    found = {"row_id": row_id, "image": image, "question": text}
    return {**found, "error": f"{file.name}, line {number}: {fault}"} if fault else found


def run_batch(
    source: Path, question: str | None, out: Path, engine: Any, settings: dict[str, Any], retry: bool = False
) -> dict[str, int]:
    """Run every row of ``source`` that ``out`` does not hold yet and append the results to it.

    Returns numbers of rows: rows, ran, done_before, errors (with those of earlier runs). ``settings``: plain values
    that decide the answers, ``call_bias`` among them; a file with others is refused. ``retry``: rows that ended in an
    error are run again. AwaresError for a file of something else, or that another process writes.
    """
    rows, folder = read_batch(source, question), source if source.is_dir() else source.parent
    out.parent.mkdir(parents=True, exist_ok=True)
    with jsonl.exclusive_lock(out):
        done = _done(rows, out, settings, retry)
        todo = [row for row in rows if row["row_id"] not in done]
        with tqdm(total=len(rows), initial=len(rows) - len(todo), unit="row", disable=None) as bar:  # on a terminal
            for start in range(0, len(todo), ROWS_PER_WRITE):
                fresh = _answers(engine, todo[start : start + ROWS_PER_WRITE], folder, settings)
                jsonl.append_records(out, fresh)
                done |= {record["row_id"]: record for record in fresh}
                bar.update(len(fresh))
    errors = sum("error" in done[row["row_id"]] for row in rows)
    return {"rows": len(rows), "ran": len(todo), "done_before": len(rows) - len(todo), "errors": errors}


def _done(rows: Sequence[Record], out: Path, settings: dict[str, Any], retry: bool) -> dict[str, Record]:
    """The lines that count, by row; a torn last line and errors that are to be run again are removed from the file."""
    jsonl.refuse_foreign(out, b'{"row_id": ', "results")
    jsonl.drop_torn_line(out)
    records, wanted, kept = jsonl.read_records(out), {row["row_id"]: row for row in rows}, {}
    for record in records:
        row = wanted.get(record["row_id"], record)
        same = (record["image"], record["question"]) == (row["image"], row["question"])
        if "error" in record and (retry or not same):
            continue
        if not same:
            raise AwaresFileError(f"{out}: row {record['row_id']} has another image or question: give another file")
        if record["settings"] != settings:
            changed = [key for key, value in settings.items() if record["settings"].get(key) != value]
            raise AwaresFileError(f"{out}: has results of another {', '.join(changed)}: give another file")
        kept[record["row_id"]] = record
    if len(kept) < len(records):
        jsonl.write_records(out, [*kept.values()])
    return kept


def _answers(engine: Any, rows: Sequence[Record], folder: Path, settings: dict[str, Any]) -> list[Record]:
    """One record for each row, in order; the fault of a row goes into its record and costs no other row."""
    images: dict[str, Image] = {}
    found: dict[str, Record] = {}
    for row in rows:
        try:
            if "error" in row:
                raise AwaresValueError(row["error"])
            check_question(row["question"])
            image = open_image(folder / row["image"], f"row {row['row_id']}")
            images[row["row_id"]] = cap(image, engine.max_side)  # at once: many large ones do not fit in memory
        except AwaresError as error:
            found[row["row_id"]] = {"error": str(error)}
    ready, questions = list(images), {row["row_id"]: row["question"] for row in rows}

    def answer(places: list[int]) -> list[Trajectory]:
        ids = [ready[place] for place in places]
        given = [images[row_id] for row_id in ids], [questions[row_id] for row_id in ids]
        return engine.run(*given, call_bias=settings["call_bias"], row_ids=ids)

    for row_id, done in zip(ready, with_failures(ready, answer), strict=True):
        found[row_id] = {"error": done.reason} if isinstance(done, Failure) else done.to_dict()
    return [{**row, "settings": settings, **found[row["row_id"]]} for row in rows]
