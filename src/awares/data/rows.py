"""Rows: what a valid row is, rows from a file of the user, and the three splits of a run.

A row is an image, a question, its accepted answers (the first one is canonical), the boxes of the question's and of
the answer's evidence in 1/1000 of the image sides, its source and its split. `engine.rows` stores them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
from filelock import FileLock
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StringConstraints

from awares.engine.images import as_png, is_plain, open_image
from awares.engine.keys import checkpoint_folder, code_of
from awares.engine.rows import FEATURES, GRADED_FEATURES, SHIFTED_FEATURES, load_rows, save_rows, stored_images
from awares.errors import AwaresError, AwaresFileError, AwaresValueError, faults_of, validated
from awares.settings import Params


def _check_box(box: list[int]) -> list[int]:
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1000 and 0 <= box[1] < box[3] <= 1000):
        raise ValueError("a box is [x1, y1, x2, y2] in 1/1000 of the image sides, with x1 < x2 and y1 < y2")
    return box


NonBlank = Annotated[str, StringConstraints(pattern=r"\S")]
RowId = Annotated[NonBlank, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
BoxList = list[Annotated[list[int], AfterValidator(_check_box)]]

MOST_FAULTS = 20  # of a file, named in one error


class Row(BaseModel, extra="forbid", strict=True):
    """One row. ``image`` is encoded: {"bytes": content of the file or None, "path": the file or None}."""

    id: RowId
    image: dict[str, Any]
    question: NonBlank
    answers: Annotated[list[NonBlank], Field(min_length=1)]
    source: str
    question_boxes: BoxList = []
    answer_boxes: BoxList = []
    split: Literal["train", "validation", "evaluation", "graded", "shifted", "base"] = "train"


def make_split(params: Params, split: str) -> datasets.Dataset:
    """The rows of all sources (train, validation) or tasks (other splits) of ``params.data``, interleaved row by row.

    The first n rows are therefore a fair mix for every n. Only the suite has ``graded`` rows, with evidence of any size
    (column ``evidence_px``), and ``shifted`` rows, unlike all others in what column ``shift`` names. Raises AwaresError
    for an unknown origin, a source without rows, an id that occurs twice, and every fault of :func:`validate_rows`.
    """
    data = params.data
    names, n, seed = {
        "train": (data.sources, data.train_rows, data.train_seed),
        "validation": (data.sources, data.validation_rows, data.validation_seed),
        "evaluation": (data.tasks, params.evaluation.rows, params.evaluation.seed),
        "graded": (data.tasks, params.evaluation.graded_rows, params.evaluation.shift_seed),
        "shifted": (data.tasks, params.evaluation.shifted_rows, params.evaluation.shift_seed),
    }[split]
    parts = [_load_source(params, name, n, seed, split) for name in names]
    rows = datasets.interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement").flatten_indices()
    check_ids(rows["id"], split)
    return rows


def _load_source(params: Params, name: str, n: int, seed: int, split: str) -> datasets.Dataset:
    """At most ``n`` rows of one source; a ``name`` that ends in .jsonl is a file."""
    if name.endswith(".jsonl"):
        file = params.path(name)
        rows = read_jsonl_rows(file).filter(lambda row_split: row_split == split, input_columns="split")
        if not len(rows):
            raise AwaresValueError(f'{file}: no row has split "{split}": add rows or remove the file from data.sources')
        rows = rows.select(range(min(n, len(rows))))
        texts = rows.remove_columns("image")
        bare = [row["id"] for row in texts if not row["question_boxes"] + row["answer_boxes"]]
        if bare and split != "evaluation" and params.curation.oracle == "annotation":
            fix = "give question_boxes or answer_boxes, or set curation.oracle to a served one (qwen3_vl)"
            raise AwaresValueError(f"{file}: {len(bare)} rows have no boxes, such as {', '.join(bare[:10])}: {fix}")
        return rows
    origin = params.data.origin
    if origin == "suite":
        from awares.mini import synthetic_rows

        graded = params.data.graded if split in ("train", "validation") else 0.0
        drawn = synthetic_rows.make_source(name, n, seed, split, params.evaluation.evidence_px, graded)
        rows = make_dataset(drawn, {"graded": GRADED_FEATURES, "shifted": SHIFTED_FEATURES}.get(split, FEATURES))
    elif origin == "hub" and split in ("train", "validation", "evaluation"):
        from awares.data import sampling

        rows = sampling.load_split(params, name, split)
    else:
        raise AwaresValueError(f"data.origin: no {split} rows from {origin!r}, choose suite (or hub, for real rows)")
    return validate_rows(rows, f"{origin}:{name}", pixels=origin != "hub")  # whose files `sampling` has decoded


def evaluation_rows(params: Params) -> datasets.Dataset:
    """The evaluation rows that stage `data` stored; with another ``evaluation.seed`` rows drawn once and kept."""
    folder = params.run_dir("data")
    if params.unseen:
        from awares.mini import synthetic_rows

        files = [*Path(__file__).parent.glob("*.py"), *Path(synthetic_rows.__file__).parent.glob("*.*")]
        code = code_of(str(params.path(params.data.sources_file)), *map(str, sorted(files)))
        drawn = params.data, params.crops.max_side, params.evaluation.seed, params.evaluation.rows
        folder = checkpoint_folder(folder, {"stage": "data", "rows": repr(drawn), "code": code})
        with FileLock(folder / ".lock"):
            if not (folder / "evaluation").is_dir():
                save_rows(make_split(params, "evaluation"), folder / "evaluation")
    return load_rows(folder / "evaluation")


def make_dataset(rows: Iterable[dict[str, Any]], features: datasets.Features = FEATURES) -> datasets.Dataset:
    """Dicts with the keys of ``features`` -> Dataset. ``image``: PIL, or {"bytes": file content}, kept as it is."""
    listed = list(rows)
    return datasets.Dataset.from_dict({key: [row[key] for row in listed] for key in features}, features=features)


def read_jsonl_rows(path: str | Path, faults: list[str] | None = None) -> datasets.Dataset:
    """Rows from a file with one JSON object per line, ``image`` relative to the file.

    Defaults: ``id`` <file>-<line>, ``source`` the file's name, ``split`` "train", no boxes. AwaresError with the faults
    of all bad lines; a list ``faults`` gets them instead, and the other rows are returned.
    """
    file = Path(path)
    if not file.is_file():
        raise AwaresFileError(f"{file}: no such file; data.sources names it")
    rows, wrong = [], list[str]() if faults is None else faults
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            with faults_of(f"{file}, line {number}"):
                rows += [_read_line(file, number, line)] if line.strip() else []
        except AwaresError as error:
            wrong.append(str(error))
    if wrong and (faults is None or not rows):
        more = [f"and {len(wrong) - MOST_FAULTS} more"] if len(wrong) > MOST_FAULTS else []
        raise AwaresValueError("\n".join(wrong[:MOST_FAULTS] + more))
    if not rows:
        raise AwaresValueError(f"{file} holds no rows")
    check_ids([row["id"] for row in rows], str(file))
    return make_dataset(rows)


def _read_line(file: Path, number: int, line: bytes) -> dict[str, Any]:
    place = f"{file}, line {number}"
    row = {"id": f"{file.stem}-{number}", "source": file.stem, **parse_line(line, place)}
    if isinstance(row.get("image"), str):
        image = file.parent / row["image"]
        if not image.is_file():
            raise AwaresFileError(f"{place}: image {row['image']} is missing; paths are relative to {file.name}")
        row["image"] = {"bytes": image.read_bytes(), "path": None}
    return _check_row(row, place, pixels=True).model_dump()


def parse_line(line: bytes, place: str) -> dict[str, Any]:
    """The JSON object of one line; AwaresValueError with ``place`` for something else."""
    try:
        row = dict(**json.loads(line))
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return row
    except (ValueError, TypeError, RecursionError) as error:
        fault = f"not a JSON object of text ({str(error)[:200]})"
        raise AwaresValueError(f"{place}: {fault}; write one row per line") from error


def validate_rows(dataset: datasets.Dataset, name: str, pixels: bool = True) -> datasets.Dataset:
    """``dataset`` if every row (with ``pixels`` its image, too) is a valid :class:`Row`; AwaresError names the row."""
    missing = [column for column in FEATURES if column not in dataset.column_names]
    if missing or not len(dataset):
        fault = f"column {', '.join(missing)} is missing; rows have {', '.join(FEATURES)}" if missing else "no rows"
        raise AwaresValueError(f"{name}: {fault}")
    for row in dataset.select_columns(list(FEATURES)).cast_column("image", datasets.Image(decode=False)):
        _check_row(row, f"{name}, row {row['id']}", pixels)
    return dataset


def _check_row(values: dict[str, Any], place: str, pixels: bool) -> Row:
    row = validated(Row, values, place)
    if pixels:
        content = row.image.get("bytes")
        picture = open_image(row.image.get("path") or "" if content is None else content, f"{place}, image")
        if content is not None and not is_plain(content):  # `datasets` would read it in another way, or not at all
            row.image["bytes"] = as_png(picture)
    return row


def check_ids(row_ids: Iterable[str], name: str) -> None:
    """AwaresValueError for an id that occurs twice."""
    [(row_id, count)] = Counter(row_ids).most_common(1)
    if count > 1:
        raise AwaresValueError(f"{name}: id {row_id} occurs {count} times; every row needs its own")


def rows_of_source(dataset: datasets.Dataset, source: str) -> datasets.Dataset:
    """The rows of one source, in their order."""
    return dataset.select([index for index, name in enumerate(dataset["source"]) if name == source])


def first_of_each(dataset: datasets.Dataset, column: str = "source") -> datasets.Dataset:
    """The first row of every value of ``column``, in order of appearance."""
    values = dataset[column][:]
    return dataset.select([values.index(value) for value in dict.fromkeys(values)])


def image_digests(dataset: datasets.Dataset) -> list[str]:
    """The sha256 of every row's image file."""
    return [hashlib.sha256(content).hexdigest() for content in stored_images(dataset)]
