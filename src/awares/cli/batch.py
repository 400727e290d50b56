"""Many questions to one policy: a folder of images or a JSONL file in, one JSON line per row out, resumable.

A result is a `Trajectory` with ``image``, ``question`` and the run's ``settings``, or the ``error`` of its row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from pydantic import BaseModel

from awares.data.rows import NonBlank, RowId, check_ids, parse_line
from awares.engine import jsonl
from awares.engine.images import IMAGE_SUFFIXES, NOTE, cap, open_image
from awares.engine.jsonl import Record
from awares.errors import AwaresError, AwaresRequestError, Failure, faults_of, validated, with_failures
from awares.method.protocol import check_question
from awares.method.rollout import Trajectory

ROWS_PER_WRITE = 64


class Line(BaseModel, strict=True):
    """The required keys of a line of a JSONL file; other keys, such as those of the row schema, are ignored."""

    id: RowId
    image: NonBlank
    question: NonBlank


def read_batch(source: Path, question: str | None = None) -> list[Record]:
    """The rows of a folder (every image in it, by name) or of a JSONL file; ``question``: for rows without their own.

    Keys: id, image, question, and error of a bad row. AwaresError: no row, no question, a repeated id.
    """
    if source.is_dir():
        if question is None:
            raise AwaresError(f"{source}: a folder of images needs a question")
        files = [path for path in sorted(source.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        rows = [{"id": file.name, "image": file.name, "question": question} for file in files]
    else:
        lines = enumerate(source.read_bytes().split(b"\n"), start=1)
        rows = [_read_row(source, number, line, question) for number, line in lines if line.strip()]
    if not rows:
        raise AwaresError(f"{source}: no image or row in it")
    check_ids([row["id"] for row in rows], str(source))
    return rows


def _read_row(file: Path, number: int, line: bytes, question: str | None) -> Record:
    place, error = f"{file.name}, line {number}", {}
    row = {"id": f"{file.stem}-{number}", "question": question}
    try:
        row |= parse_line(line, place)
        validated(Line, row, place)
    except AwaresError as fault:
        error = {"error": str(fault)}
    return {key: str(row.get(key) or "") for key in ("id", "image", "question")} | error


def run_batch(source: Path, question: str | None, out: Path, engine: Any, settings: dict[str, Any]) -> dict[str, int]:
    """Run the chunks of ``source`` that have a row without an answer in ``out``, keep the results there, count rows.

    AwaresError if ``out`` has other content, answers for other ``settings``, or another process that writes it.
    """
    rows, ran = {row["id"]: row for row in read_batch(source, question)}, list[str]()
    out.parent.mkdir(parents=True, exist_ok=True)
    with jsonl.exclusive_lock(out):
        jsonl.drop_torn_line(out, b'{"id": ', "results")
        for record in jsonl.read_records(out):
            about = {**rows.get(record["id"], {}), **settings}
            held = {**record, **record.get("settings", {})}
            if changed := [key for key in about if held.get(key) != about[key] and "error" not in record]:
                raise AwaresError(f"{out}: row {record['id']} has another {', '.join(changed)}: give another file")

    def work(ids: list[str]) -> list[Record]:
        ran.extend(ids)
        folder = source if source.is_dir() else source.parent
        return _answers(engine, [rows[row_id] for row_id in ids], folder, settings)

    found = jsonl.in_chunks(out, [*rows], ROWS_PER_WRITE, work, lambda record: "error" in record)
    errors = sum("error" in record for record in found)
    return {"rows": len(rows), "ran": len(ran), "done_before": len(rows) - len(ran), "errors": errors}


def _answers(engine: Any, rows: Sequence[Record], folder: Path, settings: dict[str, Any]) -> list[Record]:
    """One record for each row, in order; the fault of a row goes into its record and affects no other row."""
    images, found = dict[str, Image](), {row["id"]: {**row, "settings": settings} for row in rows}
    for row_id, row in found.items():
        try:
            with faults_of(f"row {row_id}"):
                if "error" not in row:
                    check_question(row["question"])
                    image = open_image(folder / row["image"], f"row {row_id}")
                    images[row_id] = cap(image, engine.max_side)  # immediately: many large ones do not fit in memory
        except AwaresError as error:
            row["error"] = str(error)
    ready, questions = [*images], [found[row_id]["question"] for row_id in images]
    done = run_rows(engine, [*images.values()], questions, ready, settings["call_bias"])
    for row_id, one in zip(ready, done, strict=True):
        found[row_id] |= {"error": one.reason} if isinstance(one, Failure) else one.to_dict()
        found[row_id] |= {"note": note} if (note := images[row_id].info.get(NOTE)) else {}
    return [*found.values()]


def run_rows(
    engine: Any, images: Sequence[Any], questions: Sequence[str], row_ids: Sequence[str], call_bias: float
) -> list[Trajectory | Failure]:
    """``engine.run``, with a `Failure` for each row that cannot be run. After an error the rows run one by one."""

    def run(places: list[int]) -> list[Trajectory]:
        part, texts, ids = ([given[place] for place in places] for given in (images, questions, row_ids))
        with faults_of(f"row {ids[0]}"):
            return engine.run(part, texts, call_bias=call_bias, row_ids=ids)

    try:
        return with_failures(row_ids, run)
    except AwaresRequestError:  # of the server, not of a row
        raise
    except AwaresError as error:
        if len(row_ids) == 1:
            return [Failure(row_ids[0], str(error))]
    alone = zip(images, questions, row_ids, strict=True)
    return [run_rows(engine, [image], [text], [row_id], call_bias)[0] for image, text, row_id in alone]
