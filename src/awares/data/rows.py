"""Rows: the one schema that every stage reads, wherever the rows come from.

A row is an image, a question, its accepted answers (the first is the canonical one), the boxes of the question's and
of the answer's region in 1/1000 of the image sides, and the source it belongs to. Rows are kept with ``datasets``.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from awares.config import Crops, Params
from awares.engine.images import MIN_SIDE, check_image
from awares.engine.rows import FEATURES, load_rows, save_rows, share_of  # noqa: F401 (part of this module)
from awares.errors import AwaresFileError, AwaresValueError
from awares.method.crops import box_union, boxes_to_crops

SPLITS = ("train", "validation", "evaluation", "base")

Loader = Callable[[str, int, int, str], list[dict[str, Any]]]


def _suite(name: str, n: int, seed: int, split: str) -> list[dict[str, Any]]:
    from awares.mini import synthetic_rows as suite

    return suite.make_source(name, n, seed, split)


# origin -> loader(name, n, seed, split) -> rows as dicts of FEATURES. A new kind of data is one entry here.
SOURCES: dict[str, Loader] = {"suite": _suite}


def load_source(
    origin: str, name: str, n: int, seed: int, split: str, params: Params | None = None
) -> datasets.Dataset:
    """At most ``n`` rows of source ``name``, drawn with ``seed``; a ``name`` ending in .jsonl is read from that file.

    Origin hub takes all of ``params``, since what it draws for one split depends on the others (`sampling`).
    Raises AwaresError for an unknown origin, a source without rows and every fault that :func:`validate` finds.
    """
    if name.endswith(".jsonl"):
        rows = from_jsonl(name)
        rows = rows.filter(lambda row_split: row_split == split, input_columns="split")
        if not len(rows):
            raise AwaresValueError(
                f'{name}: no row has split "{split}": add some, or take the file out of data.sources'
            )
        return rows.select(range(min(n, len(rows))))
    if origin == "hub" and params is not None:
        from awares.data import sampling

        return validate(sampling.load(params, name, split), f"{origin}:{name}")
    if origin not in SOURCES:
        raise AwaresValueError(f"data.origin: unknown {origin!r}, choose from {', '.join(SOURCES)}, hub")
    return validate(from_rows(SOURCES[origin](name, n, seed, split)), f"{origin}:{name}")


def make_split(params: Params, split: str) -> datasets.Dataset:
    """Every source (train, validation) or task (evaluation) of ``params.data``, taking turns row by row.

    So the first n rows are a fair mix, whatever n. Raises AwaresError as :func:`load_source` does, and for an id that
    stands twice.
    """
    data = params.data
    plan = {
        "train": (data.sources, data.train_rows, data.train_seed),
        "validation": (data.sources, data.validation_rows, data.validation_seed),
        "evaluation": (data.tasks, params.evaluation.rows, params.evaluation.seed),
    }
    names, n, seed = plan[split]
    paths = [str(params.path(name)) if name.endswith(".jsonl") else name for name in names]
    parts = [load_source(data.origin, name, n, seed, split, params) for name in paths]
    starts = np.cumsum([0, *map(len, parts)])
    turns = [(index, start + index) for part, start in zip(parts, starts, strict=False) for index in range(len(part))]
    order = [int(place) for _, place in sorted(turns)]
    return _check_ids(datasets.concatenate_datasets(parts).select(order).flatten_indices(), split)


def evaluation_rows(params: Params) -> datasets.Dataset:
    """The rows that ``params`` scores: those that stage `data` stored, or with another ``evaluation.seed`` unseen ones, drawn here."""
    return make_split(params, "evaluation") if params.unseen else load_rows(params.run_dir("data") / "evaluation")


def from_rows(rows: Iterable[dict[str, Any]]) -> datasets.Dataset:
    """Rows as dicts of FEATURES -> Dataset. ``image``: PIL, or {"bytes": encoded file} to keep its very bytes."""
    listed = list(rows)
    return datasets.Dataset.from_dict({key: [row[key] for row in listed] for key in FEATURES}, features=FEATURES)


def from_jsonl(path: str | Path) -> datasets.Dataset:
    """Rows of the user's own, one JSON object a line, in the row schema.

    ``image`` is a path relative to the file; ``answers`` is a list. ``id``, ``source``, ``split`` and the boxes may be
    left out: then the line number, the file's name, "train" and no boxes are taken. Raises AwaresError naming file and
    line.
    """
    file = Path(path)
    if not file.is_file():
        raise AwaresFileError(f"{file}: no such file; data.sources names it")
    lines = file.read_bytes().split(b"\n")
    rows = [_jsonl_row(file, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise AwaresValueError(f"{file} holds no rows")
    return _check_ids(validate(from_rows(rows), str(file)), str(file))


def _jsonl_row(file: Path, number: int, line: bytes) -> dict[str, Any]:
    place = f"{file}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise AwaresValueError(f"{place}: not JSON ({error}); every line is one object") from error
    missing = [key for key in ("image", "question", "answers") if not isinstance(row, dict) or key not in row]
    if missing:
        raise AwaresValueError(f"{place}: {', '.join(missing)} missing; a row needs image, question and answers")
    unknown = sorted(set(row) - set(FEATURES))
    if unknown:
        raise AwaresValueError(f"{place}: unknown key {', '.join(unknown)}; known are {', '.join(FEATURES)}")
    image = file.parent / str(row["image"])
    if not image.is_file():
        raise AwaresFileError(f"{place}: image {row['image']} is missing; paths are relative to {file.name}")
    empty = {
        "id": f"{file.stem}-{number}",
        "source": file.stem,
        "split": "train",
        "question_boxes": [],
        "answer_boxes": [],
    }
    row = {**empty, **row, "image": {"bytes": image.read_bytes(), "path": None}}
    _check_types(place, row)
    return row


def _check_types(place: str, row: dict[str, Any]) -> None:
    """datasets would turn a number or a nested list into text without a word: refuse it here."""
    for key in ("id", "question", "source", "split"):
        if not isinstance(row[key], str):
            raise AwaresValueError(f"{place}: {key} must be text, not {row[key]!r}")
    if not isinstance(row["answers"], list) or not all(isinstance(answer, str) for answer in row["answers"]):
        raise AwaresValueError(f"{place}: answers must be a list of texts, not {row['answers']!r}")
    for key in ("question_boxes", "answer_boxes"):
        boxes = row[key]
        if not isinstance(boxes, list) or not all(isinstance(box, list) and _whole_numbers(box) for box in boxes):
            raise AwaresValueError(f"{place}: {key} must be a list of [x1, y1, x2, y2] of whole numbers, not {boxes!r}")


def _whole_numbers(box: list[Any]) -> bool:
    return all(type(value) is int for value in box)


def of_source(dataset: datasets.Dataset, source: str) -> datasets.Dataset:
    """The rows of one source, in their order."""
    return dataset.select([index for index, name in enumerate(dataset["source"]) if name == source])


def first_of_each(dataset: datasets.Dataset, column: str = "source") -> datasets.Dataset:
    """The first row of every value of ``column``, in the order of their appearance."""
    first: dict[str, int] = {}
    for index, value in enumerate(dataset[column]):
        first.setdefault(value, index)
    return dataset.select(list(first.values()))


def image_digests(dataset: datasets.Dataset) -> list[str]:
    """A hash of every row's encoded image, to see whether an image stands in two places."""
    stored = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    return [hashlib.sha256(image["bytes"] or Path(image["path"]).read_bytes()).hexdigest() for image in stored]


def evidence_crops(dataset: datasets.Dataset, section: Crops) -> list[str]:
    """The crops that show each row's boxes by the rule of ``section``, joined to one name; "" without boxes."""
    names = []
    for question, answer in zip(dataset["question_boxes"], dataset["answer_boxes"], strict=True):
        boxes = [*question, *answer]
        limits = (section.rule, section.iou_threshold, section.coverage_threshold)
        names.append("+".join(boxes_to_crops(box_union(boxes), *limits, boxes, section.offered)) if boxes else "")
    return names


def describe(splits: Mapping[str, datasets.Dataset]) -> pd.DataFrame:
    """Per split and source: rows, distinct questions and answers, sides (px), visual tokens at full resolution."""
    records = []
    for split, dataset in splits.items():
        for source in dict.fromkeys(dataset["source"]):
            rows = of_source(dataset, source)
            sides = np.array([image.size for image in rows["image"]])
            record = {"split": split, "source": source, "rows": len(rows), "questions": len(set(rows["question"]))}
            record["answers"] = len({frozenset(answers) for answers in rows["answers"]})
            record |= {"side min": int(sides.min()), "side max": int(sides.max())}
            records.append({**record, "tokens mean": float((sides // MIN_SIDE).prod(axis=1).mean())})
    return pd.DataFrame(records)


def validate(dataset: datasets.Dataset, name: str, pixels: bool = True) -> datasets.Dataset:
    """``dataset`` itself, or AwaresError naming ``name``, the row id and what is wrong.

    Checks the columns, that there are rows, and for every row: image present, and when ``pixels`` decoded and of usable
    size (:func:`awares.engine.images.check_image`); question and answers not empty; boxes [x1, y1, x2, y2] in 0-1000.
    """
    missing = [column for column in FEATURES if column not in dataset.column_names]
    if missing:
        raise AwaresValueError(f"{name}: column {', '.join(missing)} missing; rows have {', '.join(FEATURES)}")
    if not len(dataset):
        raise AwaresValueError(f"{name}: empty, there is not one row in it")
    for row in dataset.cast_column("image", datasets.Image(decode=False)):
        place = f"{name}, row {row['id']}"
        _check_text(place, row)
        _check_boxes(place, row)
        _check_image(place, row["image"], pixels)
    return dataset


def _check_text(place: str, row: dict[str, Any]) -> None:
    if not row["id"]:
        raise AwaresValueError(f"{place}: the id is empty")
    if not (row["question"] or "").strip():
        raise AwaresValueError(f"{place}: the question is empty")
    if not row["answers"] or not all((answer or "").strip() for answer in row["answers"]):
        raise AwaresValueError(f"{place}: answers must hold at least one text and no empty one, not {row['answers']!r}")
    if row["split"] not in SPLITS:
        raise AwaresValueError(f"{place}: unknown split {row['split']!r}, choose from {', '.join(SPLITS)}")


def _check_boxes(place: str, row: dict[str, Any]) -> None:
    for key in ("question_boxes", "answer_boxes"):
        for box in row[key] or []:
            if len(box) != 4 or not (0 <= box[0] < box[2] <= 1000 and 0 <= box[1] < box[3] <= 1000):
                raise AwaresValueError(
                    f"{place}: {key} holds {box}; a box is [x1, y1, x2, y2] in 1/1000 of the image sides, "
                    "0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000"
                )


def _check_image(place: str, stored: dict[str, Any] | None, pixels: bool) -> None:
    if not stored or not (stored.get("bytes") or stored.get("path")):
        raise AwaresValueError(f"{place}: the image is missing")
    if not pixels:
        return
    content = stored["bytes"] or Path(stored["path"]).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            check_image(image, f"{place}, image")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise AwaresValueError(f"{place}: the image is corrupt ({error})") from error


def _check_ids(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    seen: set[str] = set()
    for row_id in dataset["id"]:
        if row_id in seen:
            raise AwaresValueError(f"{name}: id {row_id} stands twice; every row needs its own")
        seen.add(row_id)
    return dataset
