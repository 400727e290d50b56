"""Rows keep one schema, and a bad row is named before any work is done."""

import json
from functools import partial

import datasets
import published
import pytest

from awares.config import load_params
from awares.data.rows import evaluation_rows, make_dataset, make_split, read_jsonl_rows, validate_rows
from awares.engine.rows import FEATURES, load_rows, save_rows, share_of
from awares.errors import AwaresError
from awares.mini import synthetic_rows

encoded = partial(published.encoded, 0, 84, 56)


def row(number=0, **changes):
    boxes = {"question_boxes": [[0, 0, 500, 100]], "answer_boxes": [[600, 0, 1000, 100]]}
    text = {"question": "what is the total?", "answers": ["12 kg", "twelve kilograms"]}
    image = {"bytes": encoded(), "path": None}
    source = {"source": f"source-{number % 2}", "split": "train"}
    return {"id": f"row-{number}", "image": image, **text, **boxes, **source, **changes}


def test_rows_survive_the_disk_with_the_same_bytes_and_a_torn_folder_is_named(tmp_path):
    content = encoded(kind="JPEG")
    for name in ("a", "b"):
        save_rows(make_dataset([row(0), row(1, image={"bytes": content, "path": None})]), tmp_path / name)
    read = load_rows(tmp_path / "a")
    assert read.features == FEATURES and read[1]["answers"] == ["12 kg", "twelve kilograms"]
    assert read.cast_column("image", datasets.Image(decode=False))[1]["image"]["bytes"] == content
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    table = next((tmp_path / "b").glob("*.arrow"))
    table.write_bytes(table.read_bytes()[:100])
    for name in ("b", "nothing"):
        with pytest.raises(AwaresError, match=f"{name}: "):
            load_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"image": None}, "image"),
        ({"image": {"bytes": published.encoded(0, 84, 27), "path": None}}, "image: 84x27 px"),
        ({"answers": ["12", ""]}, "answers.1"),
    ],
)
def test_a_bad_row_is_named(changes, key):
    """tests/cases has every fault of a row."""
    rows = make_dataset([row(), row(**{"id": "bad", **changes})])
    with pytest.raises(AwaresError, match=f"some rows, row bad.*{key}"):
        validate_rows(rows, "some rows")
    for wrong, fault in ((make_dataset([]), "no rows"), (rows.remove_columns("answers"), "column answers")):
        with pytest.raises(AwaresError, match=f"some rows: {fault}"):
            validate_rows(wrong, "some rows")


def test_rows_that_no_stage_has_seen_are_drawn_once_and_kept(tmp_path, monkeypatch):
    def made(name, n, seed, split, *others):
        drawn.append((seed, n))
        return [row(id=f"{name}-{seed}-{number}", split=split) for number in range(n)]

    def unseen(**more):
        places = {"paths.runs": str(tmp_path), "data.tasks": ["chartqa"], "evaluation.study_rows": 2}
        return load_params("mini", overrides={**places, **more}).on_unseen_rows()

    drawn = []
    monkeypatch.setattr(synthetic_rows, "make_source", made)
    first, again = evaluation_rows(unseen()), evaluation_rows(unseen())
    assert first["id"][:] == ["chartqa-204-0", "chartqa-204-1"] and again[:] == first[:] and drawn == [(204, 2)]
    for more in ({"evaluation.study_rows": 3}, {"evaluation.unseen_seed": 205}):
        evaluation_rows(unseen(**more))
    assert drawn == [(204, 2), (204, 3), (205, 2)]
    assert not unseen().run_dir("data").exists()  # which is an output of DVC


def test_share_is_taken_from_every_source():
    rows = make_dataset([row(number, source="big" if number < 6 else "small") for number in range(8)])
    assert share_of(rows, 0.5)["id"][:] == ["row-0", "row-1", "row-2", "row-6"]


@pytest.fixture
def jsonl(tmp_path):
    (tmp_path / "page.png").write_bytes(encoded())
    good = {"image": "page.png", "question": "what is the total?", "answers": ["12"]}

    def write(*lines):
        file = tmp_path / "mine.jsonl"
        texts = [line if isinstance(line, str) else json.dumps({**good, **line}, ensure_ascii=False) for line in lines]
        file.write_text("\n".join(texts))
        return file

    return write


def test_jsonl_rows_have_defaults_and_only_a_line_break_ends_one(jsonl):
    file = jsonl({"question": "one\u2028two\x85three"}, {"id": "x", "answer_boxes": [[0, 0, 10, 10]]})
    rows = read_jsonl_rows(file)
    assert rows.features == FEATURES and rows[0]["question"] == "one\u2028two\x85three"
    assert rows["id"][:] == ["mine-1", "x"] and rows["source"][:] == ["mine", "mine"]
    assert rows["split"][:] == ["train", "train"] and rows[1]["answer_boxes"] == [[0, 0, 10, 10]]
    for lines, fault in (([{"id": "a"}, {"id": "a"}], "mine.jsonl: id a "), ([""], "mine.jsonl")):
        with pytest.raises(AwaresError, match=fault):
            read_jsonl_rows(jsonl(*lines))


def test_jsonl_is_a_source_like_the_others(jsonl, monkeypatch):
    def made(name, n, seed, split, *others):
        return [row(id=f"{name}-{seed}-{number}", split=split) for number in range(n)]

    monkeypatch.setattr(synthetic_rows, "make_source", made)
    boxes = {"answer_boxes": [[0, 0, 500, 500]]}
    file = jsonl(boxes, boxes, {"split": "validation", **boxes})
    params = load_params("mini", overrides={"data.sources": ["chartqa", str(file)], "data.train_rows": 5})
    train = make_split(params, "train")["id"][:]
    assert train[:4] == ["chartqa-101-0", "mine-1", "chartqa-101-1", "mine-2"]  # sources take turns
    assert train[4:] == [f"chartqa-101-{number}" for number in (2, 3, 4)]
    assert make_split(params, "validation")["id"][1] == "mine-3"
    bare, served = {"data.sources": [str(jsonl({}))]}, {"curation.oracle": "qwen3_vl"}  # needs no boxes of a row
    assert len(make_split(load_params("mini", overrides=bare | served), "train")) == 1
    for wrong, place in ((bare, "mine.jsonl.*curation.oracle"), ({"data.origin": "disk"}, "data.origin")):
        with pytest.raises(AwaresError, match=place):
            make_split(load_params("mini", overrides=wrong), "train")
