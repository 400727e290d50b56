"""The candidate crops (PAPER §1), the rule from evidence boxes to target crops C* (§2.2, Eq. 3), cutting an image.

A region is one of the paper's ten crops, by name, or a free box (the paper's future work) named ``"150,400,600,700"``.
Boxes are ``(x1, y1, x2, y2)`` in 1/1000 of the image's width and height, origin top left. ``crops.margin`` widens
only what a crop shows and costs in tokens; the rules, the areas and ``‖C‖`` know crops without it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np
from PIL import Image

from awares import registry
from awares.engine.images import resize
from awares.errors import AwaresValueError
from awares.settings import FREE_BOX, CropSettings

Box = Sequence[float]
CropRule = str | Callable[[Sequence[Box], CropSettings], Iterable[str]]

# In fractions of the image; in the order of the released policy's ids 0-8, then `all`.
CROPS: dict[str, tuple[float, float, float, float]] = {
    "top-left": (0.0, 0.0, 0.5, 0.5),
    "top-right": (0.5, 0.0, 1.0, 0.5),
    "bottom-left": (0.0, 0.5, 0.5, 1.0),
    "bottom-right": (0.5, 0.5, 1.0, 1.0),
    "center": (0.25, 0.25, 0.75, 0.75),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "all": (0.0, 0.0, 1.0, 1.0),
}
RELEASED_SIDE = 100  # px: the least side of a crop in the released code, which shows a smaller image whole
GRID = 50  # 1/1000 of a side: the edges of a free box made from evidence are multiples of this


def crop_box(name: str) -> tuple[float, float, float, float]:
    """The box of a region in 1/1000; AwaresValueError for an unknown name."""
    if name not in CROPS and not is_free(name):
        raise AwaresValueError(f"crop {name!r}: use one of {', '.join(CROPS)}, or a box such as 150,400,600,700")
    left, top, right, bottom = [1000 * edge for edge in CROPS[name]] if name in CROPS else map(float, name.split(","))
    return left, top, right, bottom


def is_free(name: str) -> bool:
    """Whether ``name`` is a free box: four integers from 0 to 1000, x1 < x2 and y1 < y2."""
    edges = [int(edge) for edge in name.split(",")] if re.fullmatch(r"\d{1,4}(,\d{1,4}){3}", name) else [0] * 4
    return edges[0] < edges[2] <= 1000 and edges[1] < edges[3] <= 1000


def free_name(box: Box) -> str:
    """The name of the smallest free box around ``box`` whose edges lie on the grid."""
    left, top, right, bottom = _solid(box)
    low = [int(GRID * (edge // GRID)) for edge in (left, top)]
    high = [int(min(1000, GRID * -(-edge // GRID))) for edge in (right, bottom)]
    return ",".join(map(str, low + high))


def allowed(name: str, offered: Sequence[str]) -> bool:
    """Whether the tool offers this region."""
    return name in offered or (FREE_BOX in offered and is_free(name))


def area(name: str) -> float:
    """Fraction of the image that one region covers; 0.25, 0.5 or 1 for a named crop."""
    return _size(crop_box(name)) / 1e6


def union_area(names: Iterable[str]) -> float:
    """‖C‖ of Eq. 6: fraction of the image that the crops cover together, overlaps counted once; 0 for no crops."""
    return _union([crop_box(name) for name in names]) / 1e6


def box_union(boxes: Iterable[Box]) -> tuple[float, float, float, float]:
    """The smallest box around ``boxes`` (at least one)."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    shared = _size(_intersection(a, b))
    union = _size(a) + _size(b) - shared
    return shared / union if union else 0.0


def coverage(box: Box, names: Iterable[str]) -> float:
    """Fraction of ``box`` that lies inside the union of the crops."""
    solid = _solid(box)
    return _union([_intersection(solid, crop_box(name)) for name in names]) / _size(solid)


def move_box(rng: np.random.Generator, sigma: float, margin: int, box: Sequence[int]) -> list[int]:
    """``box`` with a normal error of ``sigma`` on each edge, then grown by ``margin``; at least one unit a side."""
    edges = np.rint(np.asarray(box) + rng.normal(0.0, sigma, 4)).astype(int).reshape(2, 2)  # corner, axis
    low = np.clip(edges.min(axis=0) - margin, 0, 999)
    high = np.clip(edges.max(axis=0) + margin, low + 1, 1000)
    return [*low.tolist(), *high.tolist()]


def boxes_to_crops(boxes: Sequence[Box], section: CropSettings, rule: CropRule | None = None) -> tuple[str, ...]:
    """C* of PAPER §2.2: the crops for the question and answer boxes of one row; () without boxes.

    ``rule`` (default ``crops.rule``): a name of `registry.crop_rule`, or a function ``(boxes, params.crops) -> crops``.
    A tool that offers free boxes gets the box around ``boxes``, rounded out to the grid.
    """
    if not boxes:
        return ()
    if FREE_BOX in section.offered:
        return (free_name(box_union(boxes)),)
    names = registry.crop_rule.find(rule or section.rule)(boxes, section)
    return tuple(name for name in names if crop_box(name))  # raises for an unknown name from a user's rule


@registry.crop_rule("coverage")
def coverage_rule(boxes: Sequence[Box], section: CropSettings) -> tuple[str, ...]:
    """The cheapest single crop that covers ``coverage_threshold`` of the union box, else the cheapest pair, else `all`.

    The cost is paid in tokens: the sum of the areas, so that a pair as expensive as `all` is not used; ties go to the
    nearer centre. Each of ``boxes`` must lie within one crop of a pair, so that no piece of evidence is cut in half.
    """
    box, threshold = box_union(boxes), section.coverage_threshold
    cheap = [name for name in section.offered if name != "all"]
    candidates: list[tuple[str, ...]] = [(name,) for name in cheap]
    candidates += [pair for pair in combinations(cheap, 2) if sum(map(area, pair)) < 1]

    def shows(names: Sequence[str]) -> bool:
        uncut = all(any(coverage(part, [name]) >= threshold for name in names) for part in boxes)
        return coverage(box, names) >= threshold and (len(names) == 1 or uncut)

    fits = filter(shows, candidates)
    return min(fits, key=lambda names: (len(names), sum(map(area, names)), _distance(box, names)), default=("all",))


@registry.crop_rule("iou")
def iou_rule(boxes: Sequence[Box], section: CropSettings) -> tuple[str, ...]:
    """Eq. 3 as printed: every crop whose IoU with the union box is at least ``iou_threshold``, else the best crop."""
    box = box_union(boxes)
    scores = {name: iou(box, crop_box(name)) for name in section.offered}
    chosen = tuple(name for name, score in scores.items() if score >= section.iou_threshold)
    return chosen or (max(scores, key=lambda name: (scores[name], -_distance(box, (name,)))),)


def low_resolution(image: Image.Image, geometry: str = "ours") -> Image.Image:
    """I_low: width and height halved, about a quarter of the visual tokens. ``geometry``: `crops.geometry`."""
    if geometry == "released":
        return resize(image, image.width // 2, image.height // 2, Image.Resampling.LANCZOS)
    return resize(image, round(image.width / 2), round(image.height / 2))


def cut(image: Image.Image, name: str, budget: float = 1.0, margin: int = 0, geometry: str = "ours") -> Image.Image:
    """The crop ``name`` of ``image`` at native density; edges rounded to whole pixels, or the released code's.

    Its edges inside the image are moved outwards by ``margin`` px. A crop that covers, without margin, more than the
    fraction ``budget`` of the image is shrunk by the factor that brings it to that fraction.
    """
    whole = geometry == "released" and min(image.size) < RELEASED_SIDE
    left, top, right, bottom = (edge / 1000 for edge in crop_box("all" if whole else name))
    x1, x2 = _pixels(left, right, image.width, margin, geometry)
    y1, y2 = _pixels(top, bottom, image.height, margin, geometry)
    piece = image.crop((x1, y1, x2, y2))
    scale = min(1.0, (budget / area(name)) ** 0.5)
    return resize(piece, round(scale * piece.width), round(scale * piece.height))


def _pixels(low: float, high: float, side: int, margin: int, geometry: str) -> tuple[int, int]:
    """Two opposite edges, in fractions of ``side``, as px, at least one px apart, with the margin inside the image."""
    if geometry == "released":  # half of a side rounded down, at least RELEASED_SIDE, from the same corner
        part = side if high - low == 1 else max(RELEASED_SIDE, side // 2)
        start = int(2 * low * (side - part))
        end = start + part
    else:
        start = round(low * side)
        end = max(round(high * side), start + 1)
    return max(0, start - margin), min(end + margin, max(side, end))


def _distance(box: Box, names: Sequence[str]) -> float:
    """The squared distance between the centre of the box and the mean centre of the crops."""
    centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in map(crop_box, names)]
    x, y = (sum(values) / len(centres) for values in zip(*centres, strict=True))
    return (x - (box[0] + box[2]) / 2) ** 2 + (y - (box[1] + box[3]) / 2) ** 2


def _solid(box: Box) -> tuple[float, float, float, float]:
    """A box of at least one unit a side, inside 0-1000, so that a line or point has an area to be covered."""
    left, top = min(box[0], 999), min(box[1], 999)
    return left, top, max(box[2], left + 1), max(box[3], top + 1)


def _intersection(a: Box, b: Box) -> tuple[float, float, float, float]:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _size(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _union(boxes: Sequence[Box]) -> float:
    """Exact area of a union: all edges together make a grid, and the cells inside any box are summed."""
    solid = [box for box in boxes if _size(box) > 0]
    xs = sorted({edge for box in solid for edge in (box[0], box[2])})
    ys = sorted({edge for box in solid for edge in (box[1], box[3])})
    cells = ((x1, y1, x2, y2) for x1, x2 in zip(xs, xs[1:], strict=False) for y1, y2 in zip(ys, ys[1:], strict=False))
    return sum(_size(cell) for cell in cells if any(_size(_intersection(cell, box)) for box in solid))
