"""Many questions to one policy: a folder of images or a JSONL file in, one JSON line per row out, resumable.

A line of the results is a `Trajectory` with ``image``, ``question`` and the ``settings`` of the run; a row that cannot be
run is a line with ``error`` instead. Lines are written a chunk at a time, and the file says by itself which rows are
done: after a kill at any moment the same call goes on.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from tqdm import tqdm

from awares.engine.images import cap, open_image
from awares.engine.jsonl import (
    Record,
    append_records,
    drop_torn_line,
    exclusive_lock,
    read_records,
    refuse_foreign,
    write_records,
)
from awares.errors import AwaresError, AwaresFileError, AwaresValueError, Failure, with_failures
from awares.method.protocol import check_question
from awares.method.rollout import ImageSource, Trajectory

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # taken from a folder, case aside
CHUNK = 64  # rows: what a kill can cost


@dataclass(frozen=True)
class Item:
    """One row to ask. ``image``: its name in the results; ``load``: gives the image or its path."""

    row_id: str
    image: str
    question: str
    load: Callable[[], ImageSource]
    error: str | None = None  # the row itself is bad


@dataclass(frozen=True)
class Summary:
    """Rows asked for, run now, found done; and how many of them are errors."""

    rows: int
    ran: int
    done_before: int
    errors: int


def read_items(source: Path, question: str | None = None) -> list[Item]:
    """The rows of a folder (every image in it, by name) or of a JSONL file; ``question``: for rows without their own.

    A bad row becomes an item with ``error``. Raises AwaresError when there is no row, no question for a folder, or an id
    that stands twice.
    """
    items = _folder_items(source, question) if source.is_dir() else _file_items(source, question)
    if not items:
        raise AwaresValueError(f"{source}: {'no image' if source.is_dir() else 'not one row'} in it")
    seen: set[str] = set()
    for item in items:
        if item.row_id in seen:
            raise AwaresValueError(f"{source}: id {item.row_id} stands twice; every row needs its own")
        seen.add(item.row_id)
    return items


def dataset_items(rows: datasets.Dataset) -> list[Item]:
    """Rows of the row schema as items; images are decoded when their turn comes."""
    names = rows.remove_columns("image")
    return [
        Item(row["id"], row["id"], row["question"], lambda index=index: rows[index]["image"])  # type: ignore[misc]
        for index, row in enumerate(names)
    ]


def _folder_items(folder: Path, question: str | None) -> list[Item]:
    if question is None:
        raise AwaresValueError(f"{folder}: a folder of images needs a question")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES and path.is_file())
    return [Item(path.name, path.name, question, lambda path=path: path) for path in paths]  # type: ignore[misc]


def _file_items(file: Path, question: str | None) -> list[Item]:
    if not file.is_file():
        raise AwaresFileError(f"{file}: no such file")
    lines = file.read_bytes().split(b"\n")
    return [_item(file, number, line, question) for number, line in enumerate(lines, start=1) if line.strip()]


def _item(file: Path, number: int, line: bytes, question: str | None) -> Item:
    try:
        row = json.loads(line)
        error = None if isinstance(row, dict) else f"not an object but {type(row).__name__}; write image and question"
    except (ValueError, RecursionError) as fault:
        row, error = None, f"not JSON ({fault}); every line is one object"
    row = {"id": f"{file.stem}-{number}", "question": question, **(row if isinstance(row, dict) else {})}
    wrong = [
        f"{key} is {row.get(key)!r}, not text" for key in ("id", "image", "question") if not _is_text(row.get(key))
    ]
    error = error or "; ".join(wrong)
    row_id, image, asked = (str(row.get(key) or "") for key in ("id", "image", "question"))
    fault_text = f"{file.name}, line {number}: {error}" if error else None
    return Item(row_id or f"{file.stem}-{number}", image, asked, lambda: file.parent / image, fault_text)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


# Running


def run(
    items: Sequence[Item],
    out: Path,
    engine: Any,
    settings: dict[str, Any],
    size: int = CHUNK,
    retry: bool = False,
    progress: bool | None = None,
) -> Summary:
    """Ask every item that ``out`` does not hold yet, ``size`` rows at a time, and append the results to it.

    ``settings``: plain values that decide the answers; ``call_bias`` is one of them. They stand in every line, and a file
    with others is refused. ``retry``: rows that ended in an error are run again. ``progress``: None = on a terminal.
    AwaresError for a file that holds something else, or that another process is writing.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out):
        done = _done(items, out, settings, retry)
        todo = [item for item in items if item.row_id not in done]
        before = len(items) - len(todo)
        bar = tqdm(total=len(items), initial=before, unit="row", disable=None if progress is None else not progress)
        with bar:
            for start in range(0, len(todo), size):
                fresh = _ask(engine, todo[start : start + size], settings)
                append_records(out, fresh)
                done |= {record["row_id"]: record for record in fresh}
                bar.update(len(fresh))
    errors = sum("error" in done[item.row_id] for item in items)
    return Summary(len(items), len(todo), before, errors)


def trajectories(out: Path, ids: Iterable[str]) -> list[Trajectory]:
    """What ``out`` holds for the rows ``ids``, in their order; AwaresError for a row that ended in an error."""
    records = {record["row_id"]: record for record in read_records(out)}
    found = []
    for row_id in ids:
        record = records[row_id]
        if "error" in record:
            raise AwaresValueError(f"{out}: row {row_id} could not be run ({record['error']})")
        found.append(Trajectory.from_dict({key: record[key] for key in _TRAJECTORY if key in record}))
    return found


_TRAJECTORY = [one.name for one in fields(Trajectory)]
_HEAD = b'{"row_id": '  # how every line of ours begins


def _done(items: Sequence[Item], out: Path, settings: dict[str, Any], retry: bool) -> dict[str, Record]:
    """The lines that stand, by row; a torn last line and errors that are to be run again are removed from the file."""
    refuse_foreign(out, _HEAD, "results")
    drop_torn_line(out)
    records, wanted = read_records(out), {item.row_id: item for item in items}
    kept = [record for record in records if _stands(out, record, wanted.get(record["row_id"]), settings, retry)]
    if len(kept) < len(records):
        write_records(out, kept)
    return {record["row_id"]: record for record in kept}


def _stands(out: Path, record: Record, item: Item | None, settings: dict[str, Any], retry: bool) -> bool:
    """Whether a line counts for its row; AwaresFileError when it answers something else than what is asked."""
    same = item is None or (record["image"], record["question"]) == (item.image, item.question)
    if "error" in record and (retry or not same):
        return False
    if not same:
        raise AwaresFileError(f"{out}: holds row {record['row_id']} with another image or question: give another file")
    if record["settings"] != settings:
        differ = ", ".join(
            f"{key} {record['settings'].get(key)!r}" for key in settings if record["settings"].get(key) != settings[key]
        )
        raise AwaresFileError(f"{out}: holds results of other settings ({differ}): give another file")
    return True


def _ask(engine: Any, chunk: Sequence[Item], settings: dict[str, Any]) -> list[Record]:
    """One record for each item, in order; what is wrong with a row goes into its record, not to the others."""
    ready: dict[str, Image.Image] = {}
    found: dict[str, dict[str, Any]] = {}
    for item in chunk:
        try:
            ready[item.row_id] = _image(item, engine.max_side)
        except AwaresError as error:
            found[item.row_id] = {"error": str(error)}
    names, images = list(ready), list(ready.values())
    questions = [item.question for item in chunk if item.row_id in ready]

    def ask(places: list[int]) -> list[Trajectory]:
        rows = [[column[place] for place in places] for column in (images, questions, names)]
        return engine.run(rows[0], rows[1], call_bias=settings["call_bias"], row_ids=rows[2])

    done = zip(names, with_failures(names, ask), strict=True)
    found |= {name: {"error": one.reason} if isinstance(one, Failure) else one.to_dict() for name, one in done}
    return [
        {
            "row_id": item.row_id,
            "image": item.image,
            "question": item.question,
            "settings": settings,
            **found[item.row_id],
        }
        for item in chunk
    ]


def _image(item: Item, side: int) -> Image.Image:
    """The image, capped at once so that a chunk of large ones fits in memory; AwaresError for a row that cannot run."""
    if item.error:
        raise AwaresValueError(item.error)
    check_question(item.question)
    return cap(open_image(item.load(), f"row {item.row_id}"), side)
