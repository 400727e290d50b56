"""What a picture shows: dense targets on its patches, and the places from which each answer is read."""

from dataclasses import dataclass
from math import ceil, floor
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from awares.mini import vocabulary as lex
from awares.mini.drawing import Mark, PixelBox
from awares.mini.scenes import QA, Scene

Tensors = dict[str, Tensor]
PATCH, TOKEN = 14, 28  # sides of a patch and of a visual token, px
ROWS = 2  # rows of patches in a visual token
LINKS = 2  # words that lead to a value: its subject and the word before it
IGNORE = -100  # a target without a loss

CHARS = "abcdefghijklmnopqrstuvwxyz0123456789$%:"
_LISTS = [*lex.THEMES.values(), *lex.WORD_VALUES.values(), lex.SHOP, list(lex.SHAPES)]
WORDS = sorted({w for words in _LISTS for w in words} | {str(n) for n in range(100)} | {"kg", "sign"})
SUBJECTS = [*WORDS, *lex.COLOURS]
TRAITS = [*lex.COLOURS, "%", "$"]  # colour of an object, or unit of a printed number
CHAR_ID, WORD_ID, SUBJECT_ID, TRAIT_ID = (
    {name: index for index, name in enumerate(names, 1)} for names in (CHARS, WORDS, SUBJECTS, TRAITS)
)  # 0: nothing
LEGIBLE, LEGIBLE_COLOUR = 12.5, 6.0  # px
VALUES = ("field", "bar", "sign", "plate", "badge")  # kinds of questions about one value that other words lead to
Boxes = tuple[PixelBox, ...]
Source = tuple[str, list[tuple[PixelBox, bool]]]  # a word, its boxes, and whether they hold a line of print
Place = tuple[int, int]  # a view and one of its patches


@dataclass
class View:
    """A picture as the model sees it, with targets on its P patches in the processor's order.

    0: nothing legible. Print too small to read is nothing: a guess would compete with its legible copy in a part.
    IGNORE: unknown, for example a word that an edge cuts, or a glyph that is too small.
    """

    image: Image.Image
    origin: tuple[int, int]  # px of the scene at the top left corner
    scale: float  # px of this picture per px of the scene

    def __post_init__(self) -> None:
        self.grid = self.image.height // PATCH, self.image.width // PATCH  # rows, columns
        count = self.grid[0] * self.grid[1]
        self.words, self.traits = np.zeros((2, count), np.int64)
        self.glyphs = np.zeros((count, 4), np.int64)  # of the 7 px cells of each patch
        self.links = np.zeros((count, LINKS), np.int64)  # whose value is here, and the word before it
        self.leads: list[tuple[int, int, int]] = []  # (link, patch of the value, patch that names the link)

    def contains(self, box: PixelBox) -> bool:
        """Whether a box of the scene lies in this picture, with a tolerance of one pixel."""
        x0, y0, x1, y1 = self._place(box)
        return x0 >= -1 and y0 >= -1 and x1 <= self.image.width + 1 and y1 <= self.image.height + 1

    def answers(self, qa: QA) -> bool:
        """Whether the evidence of a question is legible here."""
        return not (qa.small and self.scale < 1) and all(self.contains(box) for box in evidence(qa))

    def patches(self, box: PixelBox, line: bool) -> list[int]:
        """Patches that a box of the scene covers at least half, and the one in its middle; a ``line`` has one row."""
        x0, y0, x1, y1 = self._place(box)
        if line:
            y0 = y1 = (y0 + y1) / 2
        rows, columns = (
            {*range(ceil(low / PATCH - 0.5), floor(high / PATCH - 0.5) + 1), int((low + high) / 2 // PATCH)}
            & set(range(count))
            for low, high, count in zip((y0, x0), (y1, x1), self.grid, strict=True)
        )
        return [self.index(row, column) for row in rows for column in columns]

    def index(self, row: int, column: int) -> int:
        """Index of a patch in the processor's order, which keeps the four patches of a visual token together."""
        return 4 * (row // 2 * (self.grid[1] // 2) + column // 2) + 2 * (row % 2) + column % 2

    def add_mark(self, mark: Mark) -> None:
        """Write the targets of a word or object."""
        patches, inside = self.patches(mark.box, bool(mark.chars)), self.contains(mark.box)
        size = inside * mark.size * self.scale  # px
        legible, coloured = size >= LEGIBLE, size >= LEGIBLE_COLOUR
        text = mark.text.strip("$%:") if mark.chars else mark.text
        unit = next((sign for sign in "%$" if sign in mark.text), "")
        if mark.colour or unit:
            if legible if unit else coloured:
                self.traits[patches] = TRAIT_ID[mark.colour or unit]
            elif not (inside and unit):
                self.traits[patches] = IGNORE
        if text == "sign":  # its words cover it, so only its colour is a target
            return
        if legible or not inside:
            self.words[patches] = WORD_ID[text] if legible else IGNORE
        for char, centre in mark.chars:
            x, y, _, _ = self._place((centre, (mark.box[1] + mark.box[3]) / 2, centre, 0))
            row, column = int(y // 7), int(x // 7)
            if 0 <= row < 2 * self.grid[0] and 0 <= column < 2 * self.grid[1]:
                cell = self.index(row // 2, column // 2), 2 * (row % 2) + column % 2
                self.glyphs[cell] = CHAR_ID[char] if legible and char in CHAR_ID else IGNORE

    def add_link(self, mark: Mark, sources: list[Source], needed: Boxes) -> None:
        """Write the words that lead to a value, and where they are; the boxes ``needed`` must be in view."""
        known = all(self.contains(box) for box in (mark.box, *needed))
        size = mark.size * self.scale  # px
        if not needed and not (known and size >= LEGIBLE):
            known, sources = known and size >= LEGIBLE_COLOUR, sources[:1]
        ids = [SUBJECT_ID[name] for name, _ in sources] + [0] * (LINKS - len(sources))
        here = self.patches(mark.box, bool(mark.chars))
        self.links[here] = ids if known else IGNORE
        for slot, (_, boxes) in enumerate(sources if known else []):
            shown = sorted({patch for box, line in boxes for patch in self.patches(box, line)})
            self.leads += [(slot, patch, source) for patch in here for source in shown]

    def _place(self, box: PixelBox) -> PixelBox:
        """A box of the scene in px of this picture."""
        x0, y0, x1, y1 = ((v - o) * self.scale for v, o in zip(box, 2 * self.origin, strict=True))
        return x0, y0, x1, y1


def view(scene: Scene, region: PixelBox = (0.0, 0.0, 1.0, 1.0), halve: bool = False) -> View:
    """The region (in 0..1) of a scene, at native density or halved, with its targets."""
    left, top, right, bottom = (round(v * side) for v, side in zip(region, 2 * scene.image.size, strict=True))
    image = scene.image.crop((left, top, right, bottom))
    if halve:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    shown = View(image, (left, top), 0.5 if halve else 1.0)
    for mark in scene.marks:
        shown.add_mark(mark)
    for link in find_links(scene):
        shown.add_link(*link)
    return shown


def find_links(scene: Scene) -> list[tuple[Mark, list[Source], Boxes]]:
    """The subject and the word before lead to a value; its own colour and shape, without boxes, lead to an object."""
    found: list[tuple[Mark, list[Source], Boxes]] = []
    for qa in (qa for qa in scene.qas + scene.ambiguous if qa.kind in VALUES):
        boxes = [(box, qa.kind in ("field", "bar")) for box in qa.question_boxes]
        subject: list[Source] = [(word, boxes) for word in qa.subject.split() if word in SUBJECT_ID]
        for answer in qa.answer_boxes:
            before: list[Source] = []
            for mark in marks_in(scene, answer):
                found.append((mark, (subject + before)[:LINKS], qa.question_boxes))
                text = mark.text.strip("$%:")
                before = [(text, [(mark.box, bool(mark.chars))])] if text in SUBJECT_ID else []
    return found + [(m, [(m.colour, []), (m.text, [])], ()) for m in scene.marks if m.colour and m.text != "sign"]


def evidence(qa: QA) -> Boxes:
    """The boxes that a reader must see to answer."""
    return (*qa.question_boxes, *qa.answer_boxes)


def marks_in(scene: Scene, box: PixelBox) -> list[Mark]:
    """The words and shapes inside a box, in reading order."""
    x0, y0, x1, y1 = box
    near = [m for m in scene.marks if m.box[0] >= x0 - 2 and m.box[2] <= x1 + 2 and m.text != "sign"]
    return sorted((m for m in near if m.box[1] >= y0 - 2 and m.box[3] <= y1 + 2), key=lambda m: m.box[0])


class Trail(NamedTuple):
    """How an answer is looked up, part by part."""

    subjects: tuple[frozenset[str], ...]  # words of the question that name a part
    places: tuple[tuple[frozenset[Place], ...], ...]  # of each word of a part, empty if not shown; no parts: no target
    by_word: bool  # each word of the answer has its own places; otherwise all rest on those of the first


def trail(qa: QA, scene: Scene, views: list[View]) -> Trail:
    """The trail of a question's answer through ``views``."""
    subjects = tuple(frozenset(subject.split()) for subject in qa.subject.split("+"))
    parts = [[[mark] for mark in marks_in(scene, box)] for box in qa.answer_boxes]
    if qa.kind == "presence":
        parts = [[[mark for mark in scene.marks if f"{mark.colour} {mark.text}" == qa.subject]]]
    elif qa.kind == "count":  # attention that rests on all instances alike cannot tell their number
        parts = []
    elif qa.kind in ("place", "unread"):
        parts = [[[mark for box in qa.answer_boxes for mark in marks_in(scene, box)]]]
        subjects = (frozenset().union(*subjects),)
    showing = [(index, one) for index, one in enumerate(views) if one.answers(qa)]

    def places(marks: list[Mark]) -> frozenset[Place]:
        boxes = [(mark.box, bool(mark.chars)) for mark in marks]
        return frozenset((index, patch) for index, one in showing for box in boxes for patch in one.patches(*box))

    by_word = qa.kind in (*VALUES, "pair", "bars")
    return Trail(subjects, tuple(tuple(places(marks) for marks in words) for words in parts), by_word)
