"""Rows keep one schema, and a bad row is named before any work is done."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from awares.config import load_params
from awares.data import rows as data
from awares.errors import AwaresError


def encoded(width=84, height=56, kind="PNG"):
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def row(number=0, **changes):
    return {
        "id": f"row-{number}",
        "image": {"bytes": encoded(), "path": None},
        "question": "what is the total?",
        "answers": ["12 kg", "twelve kilograms"],
        "source": f"source-{number % 2}",
        "question_boxes": [[0, 0, 500, 100]],
        "answer_boxes": [[600, 0, 1000, 100]],
        "split": "train",
        **changes,
    }


def test_rows_survive_the_disk(tmp_path):
    rows = data.from_rows([row(number) for number in range(3)])
    data.save_rows(rows, tmp_path / "rows")
    read = data.load_rows(tmp_path / "rows")
    assert read.features == data.FEATURES
    assert read[1]["answers"] == ["12 kg", "twelve kilograms"]
    assert read[1]["image"].size == (84, 56)


def test_same_rows_same_bytes(tmp_path):
    for name in ("a", "b"):
        data.save_rows(data.from_rows([row(number) for number in range(3)]), tmp_path / name)
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_encoded_images_are_kept_as_they_are():
    content = encoded(kind="JPEG")
    rows = data.from_rows([row(image={"bytes": content, "path": None})])
    assert rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"] == content


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": None}, "row bad: the image is missing"),
        ({"image": {"bytes": encoded()[:200], "path": None}}, "row bad.* image.*(corrupt|not a readable)"),
        ({"image": {"bytes": b"no image", "path": None}}, "row bad: the image is corrupt"),
        ({"image": {"bytes": encoded(84, 27), "path": None}}, "row bad, image: 84x27 px, .* at least 28"),
        ({"image": {"bytes": encoded(6000, 29), "path": None}}, "row bad, image: 6000x29 px, longer than 200:1"),
        ({"question": " "}, "row bad: the question is empty"),
        ({"answers": []}, "row bad: answers must hold at least one"),
        ({"answers": ["12", ""]}, "row bad: answers must hold at least one"),
        ({"split": "test"}, "row bad: unknown split 'test'"),
        ({"answer_boxes": [[0, 0, 1001, 10]]}, "row bad: answer_boxes holds"),
        ({"question_boxes": [[50, 0, 20, 10]]}, "row bad: question_boxes holds"),
        ({"question_boxes": [[50, 0, 20]]}, "row bad: question_boxes holds"),
    ],
)
def test_bad_row_is_named(changes, said):
    rows = data.from_rows([row(), row(id="bad", **changes)])
    with pytest.raises(AwaresError, match=f"some rows, {said}"):
        data.validate(rows, "some rows")


def test_empty_and_incomplete_datasets():
    with pytest.raises(AwaresError, match="some rows: empty"):
        data.validate(data.from_rows([]), "some rows")
    with pytest.raises(AwaresError, match="column answers missing"):
        data.validate(data.from_rows([row()]).remove_columns("answers"), "some rows")


def test_missing_and_torn_folders(tmp_path):
    with pytest.raises(AwaresError, match="no rows here"):
        data.load_rows(tmp_path / "nothing")
    data.save_rows(data.from_rows([row()]), tmp_path / "rows")
    table = next((tmp_path / "rows").glob("*.arrow"))
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(AwaresError, match="cannot be read"):
        data.load_rows(tmp_path / "rows")


def test_share_is_taken_from_every_source():
    rows = data.from_rows([row(number, source="big" if number < 6 else "small") for number in range(8)])
    half = data.share_of(rows, 0.5)
    assert half["id"][:] == ["row-0", "row-1", "row-2", "row-6"]
    assert data.share_of(rows, 1.0)["id"][:] == rows["id"][:]


@pytest.fixture
def jsonl(tmp_path):
    (tmp_path / "page.png").write_bytes(encoded())
    good = {"image": "page.png", "question": "what is the total?", "answers": ["12"]}

    def write(*lines):
        file = tmp_path / "mine.jsonl"
        file.write_text("\n".join(line if isinstance(line, str) else json.dumps({**good, **line}) for line in lines))
        return file

    return write


def test_jsonl_rows(jsonl):
    rows = data.from_jsonl(jsonl({}, {"id": "x", "answer_boxes": [[0, 0, 10, 10]], "split": "validation"}))
    assert rows.features == data.FEATURES
    assert rows["id"][:] == ["mine-1", "x"] and rows["source"][:] == ["mine", "mine"]
    assert rows["split"][:] == ["train", "validation"] and rows[1]["answer_boxes"] == [[0, 0, 10, 10]]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "mine.jsonl, line 1: not JSON"),
        (["[1]"], "line 1: image, question, answers missing"),
        ([{}, {"image": "none.png"}], "line 2: image none.png is missing"),
        ([{"answers": "12"}], "line 1: answers must be a list"),
        ([{"answers": [12]}], "line 1: answers must be a list"),
        ([{"question": 3}], "line 1: question must be text"),
        ([{"anwser_boxes": []}], "line 1: unknown key anwser_boxes"),
        ([{"answer_boxes": [0, 0, 1, 1]}], "line 1: answer_boxes must be a list"),
        ([{"answer_boxes": [[0.1, 0, 1, 1]]}], "line 1: answer_boxes must be a list"),
        ([{"id": "a"}, {"id": "a"}], "id a stands twice"),
        ([""], "holds no rows"),
    ],
)
def test_bad_jsonl(jsonl, lines, said):
    with pytest.raises(AwaresError, match=said):
        data.from_jsonl(jsonl(*lines))


def test_only_a_line_break_ends_a_row_and_other_encodings_are_named(jsonl):
    file = jsonl(
        json.dumps({"image": "page.png", "question": "one\u2028two\x85three", "answers": ["1"]}, ensure_ascii=False), {}
    )
    assert data.from_jsonl(file)["question"][:] == ["one\u2028two\x85three", "what is the total?"]
    file.write_bytes(file.read_bytes().replace(b"total?", "caf\u00e9?".encode("latin-1")))
    with pytest.raises(AwaresError, match="line 2: not JSON .*utf-8"):
        data.from_jsonl(file)


def test_jsonl_is_a_source_like_the_others(jsonl, monkeypatch):
    monkeypatch.setitem(
        data.SOURCES,
        "suite",
        lambda name, n, seed, split: [row(id=f"{name}-{seed}-{i}", split=split) for i in range(n)],
    )
    file = jsonl({}, {}, {"split": "validation"})
    params = load_params("mini", overrides={"data.sources": ["chartqa", str(file)], "data.train_rows": 5})
    train = data.make_split(params, "train")["id"][:]
    assert train[:4] == ["chartqa-101-0", "mine-1", "chartqa-101-1", "mine-2"]  # sources take turns
    assert train[4:] == [f"chartqa-101-{number}" for number in (2, 3, 4)]
    assert data.make_split(params, "validation")["id"][1] == "mine-3"


def test_jsonl_without_rows_of_the_split(jsonl):
    with pytest.raises(AwaresError, match='no row has split "validation"'):
        data.load_source("suite", str(jsonl({})), 5, 1, "validation")


def test_unknown_origin():
    with pytest.raises(AwaresError, match="data.origin: unknown 'disk', choose from suite"):
        data.load_source("disk", "chartqa", 5, 1, "train")
