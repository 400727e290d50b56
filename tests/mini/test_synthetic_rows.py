"""Synthetic rows: determinism, the size of their evidence."""

import io
from typing import get_args

import pytest
from PIL import Image

from awares.config import load_params
from awares.data.rows import image_digests, make_split
from awares.engine.rows import GRADED_FEATURES
from awares.errors import AwaresError
from awares.mini import synthetic_rows
from awares.mini.synthetic_rows import make_source
from awares.settings import Task
from awares.study.curation_tables import LEGIBLE_AT_HALF


def test_rows_depend_on_name_seed_split_and_index_alone():
    first = make_source("vstar", 3, 5, "train")
    many = make_source("vstar", synthetic_rows.PARALLEL_ROWS, 5, "train")  # drawn by several processes
    assert many[:3] == first and len({row["id"] for row in many}) == len(many)
    others = [make_source("vstar", 3, 6, "train"), make_source("vstar", 3, 5, "validation")]
    assert len({row["image"]["bytes"] for rows in (first, *others) for row in rows}) == 9
    with pytest.raises(AwaresError, match="nowhere"):
        make_source("nowhere", 1, 1, "train")


@pytest.mark.parametrize("name", synthetic_rows.PLANS)
def test_every_source_has_evidence_that_half_resolution_shows_and_hides(name):
    legible = set()
    for row in make_source(name, 24, 1, "train"):
        height = Image.open(io.BytesIO(row["image"]["bytes"])).height
        lowest = min(box[3] - box[1] for box in [*row["question_boxes"], *row["answer_boxes"]])
        legible.add(lowest * height / 1000 > LEGIBLE_AT_HALF)
    assert legible == {True, False}


def evidence_heights(rows):
    """The height in px of the lowest evidence of each row."""
    boxes = zip(rows["answer_boxes"], rows["question_boxes"], rows["image"], strict=True)
    return [min(box[3] - box[1] for box in answer or asked) * image.height / 1000 for answer, asked, image in boxes]


@pytest.mark.parametrize("name", [name for name in synthetic_rows.PLANS if name in get_args(Task)])
def test_graded_evidence_has_the_size_that_the_row_names(name):
    params = load_params("mini", overrides={"evaluation.graded_rows": 40, "evaluation.rows": 2, "data.tasks": [name]})
    rows = make_split(params, "graded")
    assert rows.features == GRADED_FEATURES and {*rows["split"]} == {"graded"}
    assert min(rows["evidence_px"]) < 16 and max(rows["evidence_px"]) > 40  # of 8 to 48
    for named, height in zip(rows["evidence_px"], evidence_heights(rows), strict=True):
        assert named * 0.85 - 1 < height < named * 1.1 + 2
    assert not set(rows["id"]) & set(make_split(params, "evaluation")["id"])
    fewer = {"evaluation.graded_rows": 9, "evaluation.evidence_px": [20, 20], "data.tasks": [name]}
    assert {*make_split(load_params("mini", overrides=fewer), "graded")["evidence_px"]} == {20}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_fraction_of_the_training_rows_has_evidence_of_any_size(split):
    def drawn(graded, split):
        few = {"data.train_rows": 30, "data.validation_rows": 30, "evaluation.rows": 1, "data.sources": ["docvqa"]}
        return make_split(load_params("mini", overrides={**few, "data.graded": graded}), split)

    def unlike(rows):
        """Whether the suite has no other evidence of this size."""
        return [height < 11 or 22 < height < 25 or height > 43 for height in evidence_heights(rows)]

    plain, half, graded = (drawn(share, split) for share in (0.0, 0.5, 1.0))
    assert half.features == plain.features  # rows do not name the size
    assert sum(unlike(graded)) >= 4 and not any(unlike(plain))
    shared = [one == other for one, other in zip(image_digests(half), image_digests(graded), strict=True)]
    assert 8 < sum(shared) < 22  # of 30
    assert not any(odd and not of_any for odd, of_any in zip(unlike(half), shared, strict=True))
    assert image_digests(drawn(0.0, "evaluation")) == image_digests(drawn(1.0, "evaluation"))


def test_a_larger_set_begins_with_the_smaller_one():
    """The study's rows contain those of a shorter run, so the main line's rows stay as they are."""
    drawn = [load_params("mini", overrides={"evaluation.study_rows": n}).on_unseen_rows() for n in (2, 3)]
    few, many = (make_split(params, "evaluation") for params in drawn)
    assert len(few) == 12 and many[:12] == few[:] and set(many["id"][12:]).isdisjoint(few["id"])
