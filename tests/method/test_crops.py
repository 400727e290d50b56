from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from awares import config
from awares.errors import AwaresError
from awares.method import crops
from awares.method.crops import CROPS, boxes_to_crops
from awares.method.protocol import Protocol


def section(**changes: Any) -> Any:
    """The section `crops` of params.yaml, as far as the rules read it."""
    values = dict(offered=tuple(CROPS), rule="coverage", iou_threshold=0.5, coverage_threshold=0.95)
    return SimpleNamespace(**{**values, **changes})


def random_boxes(count: int) -> list[tuple[int, ...]]:
    corners = np.sort(np.random.default_rng(0).integers(0, 1001, (count, 2, 2)), axis=1).reshape(count, 4)
    return [tuple(box) for box in corners.tolist() if box[0] < box[2] and box[1] < box[3]]


def test_the_table_of_crops_by_hand() -> None:
    assert list(CROPS) == list(config.CROP_NAMES)
    corners = (0, 0, 500, 500), (500, 0, 1000, 500), (0, 500, 500, 1000), (500, 500, 1000, 1000)
    halves = [(0, 0, 1000, 500), (0, 500, 1000, 1000), (0, 0, 500, 1000), (500, 0, 1000, 1000)]
    assert [crops.crop_box(name) for name in CROPS] == [*corners, (250, 250, 750, 750), *halves, (0, 0, 1000, 1000)]
    assert [crops.area(name) for name in CROPS] == [0.25] * 5 + [0.5] * 4 + [1.0]


def test_union_area_and_coverage_are_those_of_painted_crops() -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        names, canvas = rng.choice(list(CROPS), size=rng.integers(1, 5), replace=False).tolist(), np.zeros((1000, 1000))
        for x1, y1, x2, y2 in map(crops.crop_box, names):
            canvas[int(y1) : int(y2), int(x1) : int(x2)] = 1
        assert crops.union_area(names) == pytest.approx(canvas.mean())
        for box in random_boxes(5):
            assert crops.coverage(box, names) == pytest.approx(canvas[box[1] : box[3], box[0] : box[2]].mean())


@pytest.mark.parametrize(
    ("boxes", "changes", "expected"),
    [
        ([(100, 100, 200, 200)], {}, "top-left"), ([(450, 450, 550, 550)], {}, "center"), ([], {}, ""),
        ([(380, 380, 480, 480)], {}, "center"),  # in top-left and center: the centre of `center` is nearer
        ([(800, 100, 900, 900)], {}, "right"), ([(0, 0, 1000, 1000)], {}, "all"),
        ([(480, 100, 500, 100)], {}, "top-left"), ([(1000, 1000, 1000, 1000)], {}, "bottom-right"),  # a line, a point
        ([(300, 100, 700, 200), (400, 300, 500, 600)], {}, "center top"),
        ([(300, 100, 320, 600), (400, 100, 700, 200)], {}, "all"),  # every pair cuts a box in half
        ([(10, 10, 20, 20)], {"offered": ("all",)}, "all"), ([(10, 10, 20, 20)], {"offered": ("top", "all")}, "top"),
        ([(151, 400, 599, 701)], {"offered": ("box",)}, "150,400,600,750"),
        ([(0, 0, 1000, 1000)], {"rule": "iou"}, "top bottom left right all"),
        ([(0, 0, 500, 500)], {"rule": "iou"}, "top-left top left"),
        ([(10, 10, 20, 20)], {"rule": "iou"}, "top-left"),  # none reaches the threshold: the best
        ([(400, 400, 600, 600)], {"rule": "iou", "iou_threshold": 0.9}, "center"),
        ([(10, 10, 20, 20)], {"rule": "iou", "offered": ("right", "all")}, "all"),
    ],
)  # fmt: skip
def test_rules(boxes: list, changes: dict[str, Any], expected: str) -> None:
    assert boxes_to_crops(boxes, section(**changes)) == tuple(expected.split())


def test_chosen_crops_cover_the_box_and_nothing_cheaper_does() -> None:
    chosen = set()
    for box in random_boxes(300):
        names = boxes_to_crops([box], section())
        fitting = [name for name in CROPS if crops.coverage(box, [name]) >= 0.95]
        assert len(names) == 1 and crops.area(names[0]) == min(map(crops.area, fitting))
        chosen |= set(names)
    assert chosen == set(CROPS)


def test_a_rule_of_the_user_by_name_or_as_a_function() -> None:
    boxes = [(10, 10, 20, 20)]
    crops.registry.crop_rule("always_all")(lambda boxes, section: ["all"])
    assert boxes_to_crops(boxes, section(rule="always_all")) == ("all",)
    with pytest.raises(AwaresError, match="'middle'"):
        boxes_to_crops(boxes, section(), lambda boxes, section: ["middle"])
    with pytest.raises(AwaresError, match="'area'"):
        boxes_to_crops(boxes, section(rule="area"))


@pytest.mark.parametrize(
    ("name", "margin", "box"),  # in px of an image of 84 x 56
    [
        ("bottom-right", 0, (42, 28, 84, 56)),
        ("bottom-right", 14, (28, 14, 84, 56)),  # the inner edges alone
        ("center", 7, (14, 7, 70, 49)),
        ("top", 28, (0, 0, 84, 56)),  # not beyond the image
        ("all", 28, (0, 0, 84, 56)),
        ("500,0,1000,500", 14, (28, 0, 84, 42)),
        ("999,999,1000,1000", 2, (82, 54, 85, 57)),  # a box that begins behind the last px
    ],
)
def test_a_margin_moves_the_edges_inside_the_image(name: str, margin: int, box: Any) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8))
    assert crops.cut(image, name, margin=margin).tobytes() == image.crop(box).tobytes()
    shrunk = crops.cut(image, name, crops.area(name) / 4, margin)
    assert shrunk.size == (round((box[2] - box[0]) / 2), round((box[3] - box[1]) / 2))


@pytest.mark.parametrize(
    ("size", "low", "edges"),  # edges: left, top, right, bottom of five crops, by hand
    [
        ((150, 400), (75, 200), [(0, 0, 100, 200), (50, 200, 150, 400), (25, 100, 125, 300), (0, 0, 150, 200),
                                 (50, 0, 150, 400)]),  # half of 150 px is below 100 px
        ((2001, 1999), (1000, 999), [(0, 0, 1000, 999), (1001, 1000, 2001, 1999), (500, 500, 1500, 1499),
                                     (0, 0, 2001, 999), (1001, 0, 2001, 1999)]),
        ((99, 500), (49, 250), [(0, 0, 99, 500)] * 5),  # below 100 px: the whole image
    ],
)  # fmt: skip
def test_the_released_geometry(size: Any, low: Any, edges: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image, form = Image.fromarray(pixels), Protocol("released", "", "", geometry="released")
    names = "top-left", "bottom-right", "center", "top", "right"
    for name, (left, top, right, bottom) in zip(names, edges, strict=True):
        assert np.array_equal(np.asarray(form.cut(image, name)), pixels[top:bottom, left:right])
    assert form.cut(image, "all").size == size
    assert np.array_equal(np.asarray(form.low(image)), np.asarray(image.resize(low, Image.Resampling.LANCZOS)))


def test_free_boxes() -> None:
    assert crops.crop_box("150,400,600,700") == (150, 400, 600, 700)
    assert crops.area("150,400,600,700") == pytest.approx(0.135)
    assert crops.free_name((200, 300, 200, 300)) == "200,300,250,350"
    for bad in ("600,400,150,700", "0,0,1001,500", "0,0,500", "a,b,c,d", "0.5,0,1,1", "-1,0,5,5", "", "middle"):
        assert not crops.is_free(bad)
        with pytest.raises(AwaresError, match=repr(bad)):
            crops.crop_box(bad)
    image = Image.new("RGB", (400, 200))
    assert crops.cut(image, "250,0,500,500").size == (100, 100)
    assert crops.cut(image, "0,0,1000,1000", 0.25).size == crops.cut(image, "0,0,500,500", 0.25).size == (200, 100)
    assert min(crops.cut(Image.new("RGB", (28, 28)), "0,0,1,1").size) >= 1
