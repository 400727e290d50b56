"""Synthetic rows: determinism, one size of evidence per row, boxes, phrasings."""

import io
import re
from itertools import combinations
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from awares.config import load_params
from awares.data.rows import make_split
from awares.engine.rows import GRADED_FEATURES
from awares.errors import AwaresError
from awares.mini import scenes, synthetic_rows
from awares.mini import vocabulary as lexicon
from awares.mini.drawing import SHIFTS, SUITE
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
def test_every_source_makes_rows_of_one_evidence_size(name):
    legible = set()
    for row in make_source(name, 24, 1, "train"):
        width, height = Image.open(io.BytesIO(row["image"]["bytes"])).size
        assert width % 56 == height % 56 == 0 and min(width, height) >= 224
        boxes = [*row["question_boxes"], *row["answer_boxes"]]
        assert boxes and all(0 <= b[0] < b[2] <= 1000 and 0 <= b[1] < b[3] <= 1000 for b in boxes)
        legible.add(min(box[3] - box[1] for box in boxes) * height / 1000 > LEGIBLE_AT_HALF)
    assert legible == {True, False}


@pytest.mark.parametrize("painter", scenes.PAINTERS)
def test_evidence_is_small_or_large_and_never_between_and_no_word_covers_another(painter):
    rng = np.random.default_rng(2)
    for size in SUITE.sizes:
        scene = scenes.PAINTERS[painter](rng, size)
        for mark in scene.marks:
            assert mark.text == "sign" or mark.size < 20 or mark.size >= 32
        for qa in (qa for qa in scene.qas if qa.kind != "place"):  # where a value stands is seen before it can be read
            lowest = min(b[3] - b[1] for b in [*qa.question_boxes, *qa.answer_boxes])
            assert (lowest < LEGIBLE_AT_HALF) == qa.small, qa
        for a, b in combinations([mark.box for mark in scene.marks if mark.chars], 2):
            assert min(a[2], b[2]) - max(a[0], b[0]) <= 1 or min(a[3], b[3]) - max(a[1], b[1]) <= 1, (a, b)


@pytest.mark.parametrize("name", [name for name in synthetic_rows.PLANS if name in get_args(Task)])
def test_graded_evidence_has_the_size_that_the_row_names(name):
    params = load_params("mini", overrides={"evaluation.graded_rows": 40, "evaluation.rows": 2, "data.tasks": [name]})
    rows = make_split(params, "graded")
    assert rows.features == GRADED_FEATURES and {*rows["split"]} == {"graded"}
    assert min(rows["evidence_px"]) < 16 and max(rows["evidence_px"]) > 40  # of 8 to 48
    for row in rows:
        boxes = row["answer_boxes"] or row["question_boxes"]
        lowest = min(box[3] - box[1] for box in boxes) * row["image"].height / 1000
        assert row["evidence_px"] * 0.85 - 1 < lowest < row["evidence_px"] * 1.1 + 2
    assert not set(rows["id"]) & set(make_split(params, "evaluation")["id"])
    fewer = {"evaluation.graded_rows": 9, "evaluation.evidence_px": [20, 20], "data.tasks": [name]}
    assert {*make_split(load_params("mini", overrides=fewer), "graded")["evidence_px"]} == {20}


SHIFTED = SHIFTS["all four"]


@pytest.mark.parametrize("painter", list(scenes.PAINTERS)[:5])
def test_shifted_scenes_share_no_typeface_phrasing_or_size_with_the_others(painter):
    phrasings = {text for texts in lexicon.PHRASINGS.values() for text in texts}
    assert not phrasings & {text for texts in SHIFTED.phrasings.values() for text in texts}
    assert not {*SHIFTED.faces} & {*SUITE.faces} and SHIFTED.phrasings.keys() == lexicon.PHRASINGS.keys()
    known, used = (set(re.findall("[a-z]+", str(style.phrasings))) for style in (SUITE, SHIFTED))
    assert used <= known
    rng = np.random.default_rng(2)
    for size in SHIFTED.sizes:
        assert 400 <= size[0] * size[1] / 28**2 <= 1000 and size[0] % 56 == size[1] % 56 == 0
        scene = scenes.PAINTERS[painter](rng, size, SHIFTED)
        assert scene.qas and all(0 <= mark.box[0] and mark.box[2] <= size[0] + 1 for mark in scene.marks)


def test_a_larger_set_begins_with_the_smaller_one():
    """The study's rows contain those of a shorter run, so the main line's rows stay as they are."""
    drawn = {n: load_params("mini", overrides={"evaluation.study_rows": n}).on_unseen_rows() for n in (2, 3)}
    few, many = (make_split(params, "evaluation") for params in drawn.values())
    assert len(few) == 12 and many[:12] == few[:] and set(many["id"][12:]).isdisjoint(few["id"])
