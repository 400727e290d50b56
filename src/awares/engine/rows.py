"""Rows as files. `data.rows` checks rows when they enter.

The first of the ``answers`` is the canonical one; boxes are in 1/1000 of the image sides.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from PIL import Image

from awares.engine.images import cap, open_image, upright_size
from awares.errors import AwaresFileError

datasets.disable_progress_bars()
datasets.disable_caching()  # cache files next to stored rows would change what DVC hashes

TRAINED_ON = (
    "id",
    "question",
    "answers",
    "high_answer",
    "label",
    "target_crops",
)  # and the image: what a training reads of a row
_TEXT, _BOXES = datasets.Value("string"), datasets.List(datasets.List(datasets.Value("int32")))
FEATURES = datasets.Features(
    {"id": _TEXT, "image": datasets.Image(), "question": _TEXT, "answers": datasets.List(_TEXT), "source": _TEXT}
    | {"question_boxes": _BOXES, "answer_boxes": _BOXES, "split": _TEXT}
)
GRADED_FEATURES = datasets.Features({**FEATURES, "evidence_px": datasets.Value("int32")})
SHIFTED_FEATURES = datasets.Features({**FEATURES, "shift": _TEXT})


def save_rows(dataset: datasets.Dataset, path: str | Path) -> None:
    """Write to folder ``path``, whole or not at all; the same rows give the same bytes."""
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    dataset.save_to_disk(str(partial))
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def load_rows(path: str | Path) -> datasets.Dataset:
    """Rows that `save_rows` wrote; AwaresError when the folder is missing or torn."""
    folder = Path(path)
    if not (folder / "state.json").is_file():
        raise AwaresFileError(f"{folder}: no rows here; run the stage that writes them (`dvc repro`)")
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets raise many kinds for a torn file
        raise AwaresFileError(f"{folder}: cannot read the rows ({error}); delete it and run `dvc repro`") from error


def share_of(dataset: datasets.Dataset, share: float) -> datasets.Dataset:
    """The first ``share`` (0 to 1) of the rows of every source, in their order."""
    rows = pd.Series(dataset["source"][:], dtype=str)
    groups = rows.groupby(rows)
    return dataset.select(np.flatnonzero(groups.cumcount() < (share * groups.transform("size")).round()))


def rows_digest(rows: datasets.Dataset) -> str:
    """Hash of what a training reads of ``rows``: fingerprints of ``datasets`` differ between processes."""
    digest = hashlib.sha256()
    for row, image in zip(rows.remove_columns("image"), stored_images(rows), strict=True):
        digest.update(json.dumps([row.get(column) for column in TRAINED_ON]).encode())
        digest.update(image)
    return digest.hexdigest()


def picture(row: dict[str, Any], max_side: int) -> Image.Image:
    """The image of a row as the interaction sees it (PAPER §1): upright RGB, sides of at most ``max_side`` px."""
    return cap(open_image(row["image"], f"row {row['id']}"), max_side)


def picture_sizes(rows: datasets.Dataset, max_side: int) -> list[tuple[int, int]]:
    """(width, height) in px of every `picture`, from the headers of the files, without decoding a pixel."""
    return [cap(Image.new("1", upright_size(stored)), max_side).size for stored in stored_images(rows)]


def stored_images(rows: datasets.Dataset) -> Iterator[bytes]:
    """The content of every row's image file."""
    for image in rows.cast_column("image", datasets.Image(decode=False))["image"]:
        yield image["bytes"] or Path(image["path"]).read_bytes()
