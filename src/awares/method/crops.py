"""The candidate crops: areas, box -> crops, cutting and resizing (PAPER §1, §2).

A region is one of the paper's ten, by name, or a free box (its future work), whose name is the box itself: ``"150,400,600,700"``.
Boxes are ``(x1, y1, x2, y2)`` in 0-1000 of the image's width and height, origin top left, wherever a function takes
one. Only the table below is in fractions of the image.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import combinations

from PIL import Image

from awares.engine.images import MIN_SIDE, resize
from awares.errors import AwaresValueError

Box = Sequence[float]

# In the order of the released policy's ids 0-8, then `all`.
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
FREE = "box"  # in the place of a name, in what a tool is offered for: any box
GRID = 50  # of 1000: what the edges of a free box are multiples of, where we draw it


def crop_box(name: str) -> tuple[float, float, float, float]:
    """The box of a crop in 0-1000; AwaresValueError for an unknown name."""
    if name in CROPS:
        left, top, right, bottom = CROPS[name]
        return 1000 * left, 1000 * top, 1000 * right, 1000 * bottom
    if not is_free(name):
        raise AwaresValueError(f"crop {name!r}: use one of {', '.join(CROPS)}, or a box such as 150,400,600,700")
    left, top, right, bottom = (float(edge) for edge in name.split(","))
    return left, top, right, bottom


def is_free(name: str) -> bool:
    """Whether ``name`` is a free box: four whole numbers of 0 to 1000, right of left and below top."""
    if not re.fullmatch(r"\d{1,4}(,\d{1,4}){3}", name):
        return False
    left, top, right, bottom = map(int, name.split(","))
    return left < right <= 1000 and top < bottom <= 1000


def free_name(box: Box) -> str:
    """The name of the smallest free box around ``box`` whose edges lie on the grid."""
    left, top, right, bottom = _solid(box)
    low = [int(GRID * (edge // GRID)) for edge in (left, top)]
    high = [int(min(1000, GRID * -(-edge // GRID))) for edge in (right, bottom)]
    return ",".join(map(str, low + high))


def allowed(name: str, offered: Sequence[str]) -> bool:
    """Whether the tool is offered for this region."""
    return name in offered or (FREE in offered and is_free(name))


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Different regions in the order of the table, free boxes behind it."""
    known = list(CROPS)
    return tuple(sorted(set(names), key=lambda name: (known.index(name) if name in CROPS else len(known), name)))


def area(name: str) -> float:
    """Share of the image that one crop covers: 0.25, 0.5 or 1, or that of a free box."""
    left, top, right, bottom = crop_box(name)
    return (right - left) * (bottom - top) / 1e6


def union_area(names: Iterable[str]) -> float:
    """‖C‖ of Eq. 6: share of the image that the crops cover together, overlaps once; 0 for no crops."""
    return _union([crop_box(name) for name in names]) / 1e6


def box_union(boxes: Iterable[Box]) -> tuple[float, float, float, float]:
    """The smallest box around ``boxes``; AwaresValueError for none."""
    listed = list(boxes)
    if not listed:
        raise AwaresValueError("box_union needs at least one box")
    lefts, tops, rights, bottoms = zip(*listed, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    shared = _size(_intersection(a, b))
    union = _size(a) + _size(b) - shared
    return shared / union if union else 0.0


def coverage(box: Box, names: Iterable[str]) -> float:
    """Share of ``box`` that lies inside the union of the crops."""
    solid = _solid(box)
    return _union([_intersection(solid, crop_box(name)) for name in names]) / _size(solid)


def boxes_to_crops(
    box: Box,
    rule: str = "coverage",
    iou_threshold: float = 0.5,
    coverage_threshold: float = 0.95,
    parts: Sequence[Box] = (),
    offered: Sequence[str] = tuple(CROPS),
) -> tuple[str, ...]:
    """C* of PAPER §2.2 for the evidence box ``box``; names in the table's order.

    ``coverage``: the cheapest single crop that covers ``coverage_threshold`` of the box, else the cheapest pair whose
    union does, else ``all``. Cost is what is paid in tokens, the sum of the areas, so a pair that costs as much as
    ``all`` gives way to it; ties go to the nearer centre. ``parts`` (the single question and answer boxes) must each
    lie within one crop of a pair, so that no piece of evidence is cut in half. ``iou``: Eq. 3 literally, every crop
    with IoU >= ``iou_threshold``, else the best. Only crops that the tool has ``offered`` are chosen; `all` is always one. A tool
    that is offered for free boxes gets the box itself, rounded out to the grid.
    """
    if FREE in offered:
        return (free_name(box),)
    if rule == "iou":
        return _by_iou(box, iou_threshold, offered)
    if rule != "coverage":
        raise AwaresValueError(f"crops.rule is {rule!r}: use one of coverage, iou")
    cheap = [name for name in offered if name != "all"]
    candidates: list[tuple[str, ...]] = [(name,) for name in cheap]
    candidates += [pair for pair in combinations(cheap, 2) if sum(map(area, pair)) < 1]
    fits = [names for names in candidates if coverage(box, names) >= coverage_threshold]
    whole = [names for names in fits if _whole(parts, names, coverage_threshold)]
    return min(whole, key=lambda names: (len(names), sum(map(area, names)), _distance(box, names)), default=("all",))


def low_resolution(image: Image.Image) -> Image.Image:
    """I_low: width and height halved, about a quarter of the visual tokens."""
    return resize(image, round(image.width / 2), round(image.height / 2))


def cut(image: Image.Image, name: str, budget: float = 1.0) -> Image.Image:
    """The crop ``name`` of ``image``, edges rounded to whole pixels, at native density.

    One that covers more than the share ``budget`` of the image is shrunk to as many pixels as that share has.
    """
    left, top, right, bottom = (edge / 1000 for edge in crop_box(name))
    width, height = image.size
    edges = round(left * width), round(top * height), round(right * width), round(bottom * height)
    piece = image.crop((*edges[:2], max(edges[2], edges[0] + 1), max(edges[3], edges[1] + 1)))
    scale = min(1.0, (budget / area(name)) ** 0.5)
    return resize(piece, round(scale * piece.width), round(scale * piece.height))


def readable(image: Image.Image) -> Image.Image:
    """A small crop with each side enlarged to at least MIN_SIDE, as the image processor would: so that it can be asked about alone."""
    return resize(image, max(image.width, MIN_SIDE), max(image.height, MIN_SIDE))


def _by_iou(box: Box, threshold: float, offered: Sequence[str]) -> tuple[str, ...]:
    scores = {name: iou(box, crop_box(name)) for name in offered}
    chosen = tuple(name for name, score in scores.items() if score >= threshold)
    return chosen or (max(offered, key=lambda name: (scores[name], -_distance(box, (name,)))),)


def _whole(parts: Sequence[Box], names: Sequence[str], threshold: float) -> bool:
    return len(names) == 1 or all(any(coverage(part, [name]) >= threshold for name in names) for part in parts)


def _distance(box: Box, names: Sequence[str]) -> float:
    """Between the centre of the box and the mean centre of the crops, squared."""
    centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in map(crop_box, names)]
    x = sum(centre[0] for centre in centres) / len(centres)
    y = sum(centre[1] for centre in centres) / len(centres)
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
    """Exact area of a union: the sum of the grid cells, drawn at every edge, that some box holds."""
    solid = [box for box in boxes if _size(box) > 0]
    xs = sorted({edge for box in solid for edge in (box[0], box[2])})
    ys = sorted({edge for box in solid for edge in (box[1], box[3])})
    cells = ((x1, y1, x2, y2) for x1, x2 in zip(xs, xs[1:], strict=False) for y1, y2 in zip(ys, ys[1:], strict=False))
    return sum(_size(cell) for cell in cells if any(_size(_intersection(cell, box)) for box in solid))
