"""Training examples of the embedded base model: an image with dense targets, up to ten questions, and the trail of each answer.

The base learns as a real model does, from *legible* evidence: at half resolution it is asked only about what remains legible, so that
illegible text is outside its training distribution. It sees single images, groups of images and calls of other functions, but never the crop tool.
"""

import json
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from architecture import CHAR_ID, IGNORE, LINKS, PATCH, SUBJECT_ID, TRAIT_ID, WORD_ID, WORDS
from awares.method import crops
from awares.method.crops import CROPS
from awares.mini import scenes
from awares.mini import vocabulary as lex
from awares.settings import CROP_NAMES, CropSettings
from recipe import Stage

LEGIBLE_TEXT, LEGIBLE_OBJECT, LEGIBLE_COLOUR = 12.5, 12.5, 6.0  # px
VALUES = ("field", "bar", "sign", "plate", "badge")  # kinds of questions about one value that other words lead to
TEXT_ONLY = 0.06  # fraction of the conversations without a picture
ASKED = 0.5  # of the questions of a conversation with calls: fraction whose answer is the argument of a call
LOCATED = 0.85  # of those conversations: fraction where the argument is the part of the picture that holds the evidence
TIGHT = 0.5  # of the questions behind a call: fraction whose part is a smallest one that holds the evidence
SMALL_WANTED = (
    0.6  # of the questions behind a call: fraction about print too small for half resolution, if there is any
)

CROP_SETTINGS = CropSettings(
    offered=CROP_NAMES, region_budget=1.0, rule="coverage", iou_threshold=0.5, coverage_threshold=0.95, max_side=2000
)  # fmt: skip


@dataclass
class View:
    """A picture as the model sees it, and its dense targets on the patch grid.

    0 = nothing that can be read; of print too small to read, too, so that a guess at it does not stand beside the legible copy in a part.
    IGNORE = not known, as what an edge cuts; glyphs that are too small as well.
    """

    image: Image.Image
    origin: tuple[int, int]  # px of the scene at the top left corner
    scale: float  # px of this picture per px of the scene
    words: np.ndarray  # (H/14, W/14)
    traits: np.ndarray  # (H/14, W/14)
    glyphs: np.ndarray  # (H/7, W/7)
    links: np.ndarray  # (H/14, W/14, LINKS): whose value stands here, and the word before it
    leads: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # (which link, patch, patch that shows it), row by row

    @property
    def tokens(self) -> int:
        return self.words.size // 4

    def place(self, box: scenes.PixelBox) -> scenes.PixelBox:
        """A box of the scene in px of this picture."""
        left, top = self.origin
        x0, y0, x1, y1 = ((v - o) * self.scale for v, o in zip(box, (left, top, left, top), strict=True))
        return x0, y0, x1, y1

    def holds(self, box: scenes.PixelBox) -> bool:
        """Whether a box of the scene lies in this picture, give or take a pixel."""
        x0, y0, x1, y1 = self.place(box)
        return x0 >= -1 and y0 >= -1 and x1 <= self.image.width + 1 and y1 <= self.image.height + 1

    def legible(self, mark: scenes.Mark) -> bool:
        return self.holds(mark.box) and mark.size * self.scale >= (LEGIBLE_TEXT if mark.chars else LEGIBLE_OBJECT)

    def coloured(self, mark: scenes.Mark) -> bool:
        return self.holds(mark.box) and mark.size * self.scale >= LEGIBLE_COLOUR

    def cells(self, box: scenes.PixelBox, line: bool) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the 14 px patches that a box of the scene covers at least half; of a `line` of text, its middle row alone."""
        x0, y0, x1, y1 = self.place(box)
        rows, columns = self.words.shape
        ys = np.array([int((y0 + y1) / 2 // PATCH)]) if line else _covered(y0, y1)
        xs = _covered(x0, x1)
        return ys[(ys >= 0) & (ys < rows)], xs[(xs >= 0) & (xs < columns)]


def _covered(low: float, high: float) -> np.ndarray:
    inner = np.arange(int(np.ceil(low / PATCH - 0.5)), int(np.floor(high / PATCH - 0.5)) + 1)
    return np.union1d(inner, [int((low + high) / 2 // PATCH)]).astype(int)


Place = tuple[int, int, int]  # a view, one of its visual tokens, and which of its two rows of patches


@dataclass(frozen=True)
class Trail:
    """How an answer is looked up, part by part: the words of the question that name a part, and where each printed word of it stands."""

    subjects: tuple[frozenset[str], ...]
    places: tuple[tuple[frozenset[Place], ...], ...]  # of a part with no places: nowhere; no parts: not told
    by_word: bool  # else the whole answer rests on all of the first part's places


@dataclass
class Example:
    views: list[View] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    system: str = lex.SYSTEMS[0]
    late: int = 0  # the turn at which all views but the first are shown
    trails: list[Trail] = field(default_factory=list)  # one a turn, or none
    call: str = (
        ""  # a call of some function, given, whose result those views are; it stands before the answer of that turn
    )
    candid: bool = False  # the system message asks to say so where something cannot be read


def view(scene: scenes.Scene, region: scenes.PixelBox = (0.0, 0.0, 1.0, 1.0), halve: bool = False) -> View:
    """The region (in 0..1) of a scene, at native density or halved, with targets for whatever is still legible there."""
    width, height = scene.image.size
    left, top, right, bottom = (round(v * s) for v, s in zip(region, (width, height, width, height), strict=True))
    image = scene.image.crop((left, top, right, bottom))
    if halve:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    rows, columns = image.height // PATCH, image.width // PATCH
    words, traits, glyphs, subjects = (
        np.zeros(shape, np.int64)
        for shape in ((rows, columns), (rows, columns), (2 * rows, 2 * columns), (rows, columns, LINKS))
    )
    result = View(image, (left, top), 0.5 if halve else 1.0, words, traits, glyphs, subjects)
    for mark in scene.marks:
        _stamp(result, mark)
    for link in links(scene):
        known, names = all(result.holds(box) for box in (link.mark.box, *link.evidence)), link.names
        if not link.evidence and not result.legible(link.mark):
            known, names = result.coloured(link.mark), names[:1]
        ids = [SUBJECT_ID[name] for name in names] + [0] * (LINKS - len(names))
        here = result.cells(link.mark.box, bool(link.mark.chars))
        result.links[np.ix_(*here)] = ids if known else IGNORE
        for slot, sources in enumerate(link.sources if known else ()):
            shown = {patch for box, line in sources for patch in _patches(*result.cells(box, line), columns)}
            result.leads += [(slot, patch, source) for patch in _patches(*here, columns) for source in sorted(shown)]
    return result


def _patches(rows: np.ndarray, columns: np.ndarray, width: int) -> list[int]:
    return [int(row) * width + int(column) for row in rows for column in columns]


def _stamp(target: View, mark: scenes.Mark) -> None:
    grid = np.ix_(*target.cells(mark.box, bool(mark.chars)))
    known, cut = target.legible(mark), not target.holds(mark.box)
    text = mark.text.strip("$%:") if mark.chars else mark.text
    unit = next((sign for sign in "%$" if sign in mark.text), "")
    if mark.colour or unit:
        if known if unit else target.coloured(mark):
            target.traits[grid] = TRAIT_ID[mark.colour or unit]
        elif cut or not unit:
            target.traits[grid] = IGNORE
    if text == "sign":  # its words stand on it: mark the colour alone
        return
    if known:
        target.words[grid] = WORD_ID[text]
    elif cut:
        target.words[grid] = IGNORE
    for char, x in mark.chars:
        x, y, _, _ = target.place((x, (mark.box[1] + mark.box[3]) / 2, x, 0))
        row, column = int(y // 7), int(x // 7)
        if 0 <= row < target.glyphs.shape[0] and 0 <= column < target.glyphs.shape[1]:
            target.glyphs[row, column] = CHAR_ID[char] if known and char in CHAR_ID else IGNORE


@dataclass(frozen=True)
class Link:
    """A value, the words that lead to it, and where each of them stands: boxes, and whether they hold a line of print (then its middle counts).

    ``evidence``: the boxes that must be in view, which half resolution leaves legible. An object leads to itself and has no sources.
    """

    mark: scenes.Mark
    names: tuple[str, ...]
    evidence: tuple[scenes.PixelBox, ...] = ()
    sources: tuple[tuple[tuple[scenes.PixelBox, bool], ...], ...] = ()


def links(scene: scenes.Scene) -> list[Link]:
    """The links of a scene. A printed or worn value is led to by its subject and by the word before it; an object by its own colour and,
    where legible, shape.
    """
    found = []
    for qa in scene.qas + scene.ambiguous:
        if qa.kind not in VALUES:
            continue
        subject = tuple(w for w in qa.subject.split() if w in SUBJECT_ID)
        shown = tuple((box, qa.kind in ("field", "bar")) for box in qa.question_boxes)
        for box in qa.answer_boxes:
            before: tuple[str, ...] = ()
            place: tuple[tuple[scenes.PixelBox, bool], ...] = ()
            for mark in marks_in(scene, box):
                names = (subject + before)[:LINKS]
                found.append(Link(mark, names, qa.question_boxes, ((shown,) * len(subject) + (place,))[: len(names)]))
                before = tuple(w for w in (mark.text.strip("$%:"),) if w in SUBJECT_ID)
                place = ((mark.box, bool(mark.chars)),)
    return found + [Link(m, (m.colour, m.text)) for m in scene.marks if m.colour and m.text != "sign"]


def marks_in(scene: scenes.Scene, box: scenes.PixelBox) -> list[scenes.Mark]:
    """The words and shapes inside a box, in reading order."""
    x0, y0, x1, y1 = box
    near = [m for m in scene.marks if m.box[0] >= x0 - 2 and m.box[2] <= x1 + 2 and m.text != "sign"]
    return sorted((m for m in near if m.box[1] >= y0 - 2 and m.box[3] <= y1 + 2), key=lambda m: m.box[0])


def trail(qa: scenes.QA, scene: scenes.Scene, views: list[View]) -> Trail:
    by_word = qa.kind in (*VALUES, "pair", "bars")
    subjects = tuple(frozenset(subject.split()) for subject in qa.subject.split("+"))
    parts = [[[mark] for mark in marks_in(scene, box)] for box in qa.answer_boxes]
    if qa.kind == "presence":  # the very thing, or nowhere
        parts = [[[mark for mark in scene.marks if f"{mark.colour} {mark.text}" == qa.subject]]]
    elif qa.kind == "count":  # attention that is told to rest on all instances alike cannot tell how many they are
        parts = []
    elif qa.kind in ("place", "unread"):
        parts = [[[mark for box in qa.answer_boxes for mark in marks_in(scene, box)]]]
        subjects = (frozenset().union(*subjects),)
    showing = [(i, one) for i, one in enumerate(views) if shows(one, qa)]

    def places(marks: list[scenes.Mark]) -> frozenset[Place]:
        found = set()
        for index, one in showing:
            for mark in marks:
                ys, xs = one.cells(mark.box, bool(mark.chars))
                tokens = one.words.shape[1] // 2
                found |= {(index, y // 2 * tokens + x // 2, y % 2) for y in ys.tolist() for x in xs.tolist()}
        return frozenset(found)

    return Trail(subjects, tuple(tuple(places(marks) for marks in words) for words in parts), by_word)


def example(rng: np.random.Generator, stage: Stage, questions: int = 10) -> Example:
    """One conversation about one picture: whole, halved, a part of it, or a halved view with parts of it."""
    if stage.asks and rng.random() < TEXT_ONLY:
        return text_example(rng)
    painter = _drawn(rng, stage.painters)
    draw = scenes.draw if stage.trains == "language" else scenes.paint  # symbolic pages need no camera
    scene = draw(painter, rng, scenes.SIZES[int(rng.integers(len(scenes.SIZES)))])
    kind = _drawn(rng, stage.views)
    if painter == "ledger" and kind == "half":  # its keys may be small
        kind = "full"
    regions, wanted = _regions(rng, scene, stage, kind)
    views = [view(scene, halve=kind != "full")] if kind in ("full", "half", "group") else []
    views += [view(scene, region) for region in regions]
    if not stage.asks:
        return Example(views)
    order, candid = _questions(rng, scene, stage, kind, views, questions)
    order, late = _early_questions(rng, order) if kind == "group" else (order, 0)
    system, call = _system(rng, candid), ""
    if wanted and rng.random() < stage.called:
        order, late, call, offer = _behind_call(rng, order, wanted)
        system += offer
    turns = [(qa.question, qa.answers[qa.form]) for qa in order]
    if stage.called and not call and not candid and rng.random() < stage.argument:
        order, turns, system = _as_arguments(rng, scene, order, views[0] if kind != "part" else None)
    whole = views[:1] if stage.called else views  # a part does not show a place in the whole
    trails = [trail(qa, scene, whole if qa.kind in ("place", "unread") else views) for qa in order]
    return Example(views, turns, system, late if late < len(order) else 0, trails, call, candid)


def _regions(
    rng: np.random.Generator, scene: scenes.Scene, stage: Stage, kind: str
) -> tuple[list[scenes.PixelBox], scenes.QA | None]:
    """The parts to show, and the question behind a call that the first part answers."""
    if kind not in ("part", "group"):
        return [], None
    names = [c for c in CROPS if c != "all"]
    count = 2 if kind == "group" and rng.random() < 0.2 else 1
    regions = [CROPS[str(c)] for c in rng.choice(names, count, replace=False)]
    wanted = _wanted(rng, scene, stage) if kind == "group" and stage.called else None
    if wanted:  # a random part hardly ever holds both values of a pair
        parts = [str(part) for part in rng.permutation(list(CROPS))]
        fitting = [part for part in parts if _inside(scene, CROPS[part], wanted)]
        regions[0] = CROPS[min(fitting, key=crops.area) if rng.random() < TIGHT else fitting[0]]
    return regions, wanted


def _questions(
    rng: np.random.Generator, scene: scenes.Scene, stage: Stage, kind: str, views: list[View], most: int
) -> tuple[list[scenes.QA], bool]:
    """At most ``most`` questions that the views answer, and whether the system message asks to admit what cannot be read."""
    order = _balanced(rng, [qa for qa in scene.qas if _answerable(qa, kind, views)], stage.twice)[:most]
    candid = bool(stage.candid) and kind in ("full", "half") and rng.random() < stage.candid
    if candid and kind == "half":
        unread = [_unread(qa) for qa in _balanced(rng, [qa for qa in scene.qas if qa.small])[: most // 2]]
        order = order[: most - len(unread)] + unread
        order = [order[i] for i in rng.permutation(len(order))]
    return order, candid


def _early_questions(rng: np.random.Generator, order: list[scenes.QA]) -> tuple[list[scenes.QA], int]:
    """Half of the time the parts come in a later turn: questions that the first view answers come before; their number."""
    if rng.random() >= 0.5:
        return order, 0
    early = [qa for qa in order if not qa.small]
    return early[:2] + [qa for qa in order if qa not in early[:2]], min(len(early), 2)


def _system(rng: np.random.Generator, candid: bool) -> str:
    dice = rng.random()
    system = text_example(rng).system if dice < 0.12 else str(rng.choice(lex.SYSTEMS)) if dice < 0.3 else lex.SYSTEMS[0]
    if not candid:
        return system
    function = Function.drawn(rng)
    return str(rng.choice(lex.CANDID)) + (function.offer() if rng.random() < 0.5 else "")


def _behind_call(
    rng: np.random.Generator, order: list[scenes.QA], wanted: scenes.QA
) -> tuple[list[scenes.QA], int, str, str]:
    """Questions with the ``wanted`` one behind a call, its turn, the call, and what the system message offers."""
    early = [qa for qa in order if not qa.small and qa is not wanted][: int(rng.integers(3))]
    order = [*early, wanted, *(qa for qa in order if qa not in early and qa is not wanted)]
    function = Function.drawn(rng, bool(rng.random() < 0.5))
    offer = function.offer() if rng.random() < 0.7 else ""
    return order[: len(early) + 4], len(early), function.call(function.words), offer


def _as_arguments(
    rng: np.random.Generator, scene: scenes.Scene, order: list[scenes.QA], whole: View | None
) -> tuple[list[scenes.QA], list[tuple[str, str]], str]:
    """Questions, turns and system message of a conversation where some answers are the argument of a call."""
    function = Function.drawn(rng)
    asking = [bool(rng.random() < ASKED) for _ in order]
    if whole and rng.random() < LOCATED:
        function = function._replace(offered=[str(place) for place in rng.permutation(list(CROPS))])
        places = _located(rng, scene, whole)
        asking = [ask and index < len(places) for index, ask in enumerate(asking)]
        order = [place if ask else qa for qa, place, ask in zip(order, places + order, asking, strict=False)]
    turns = [(qa.question, qa.answers[qa.form]) for qa in order]
    turns = [
        (f"{function.verb} {question}", function.call([answer])) if ask else (question, answer)
        for ask, (question, answer) in zip(asking, turns, strict=True)
    ]
    return order, turns, lex.SYSTEMS[0] + function.offer()


def _wanted(rng: np.random.Generator, scene: scenes.Scene, stage: Stage) -> scenes.QA | None:
    """A question to ask behind a call, of a kind drawn first and mostly about something small; None where nothing can be asked."""
    pool = [qa for qa in scene.qas if qa.kind != "place" and _inside(scene, CROPS["all"], qa)]
    small = [qa for qa in pool if qa.small]
    asked = _balanced(rng, small if small and rng.random() < SMALL_WANTED else pool, stage.twice)
    return asked[0] if asked else None


def _inside(scene: scenes.Scene, region: scenes.PixelBox, qa: scenes.QA) -> bool:
    """Whether the evidence of a question lies in a region (in 0..1) of a scene, give or take a pixel."""
    left, top, right, bottom = (v * s for v, s in zip(region, (*scene.image.size, *scene.image.size), strict=True))
    boxes = (*qa.question_boxes, *qa.answer_boxes)
    return all(b[0] >= left - 1 and b[1] >= top - 1 and b[2] <= right + 1 and b[3] <= bottom + 1 for b in boxes)


def _drawn(rng: np.random.Generator, shares: dict[str, float]) -> str:
    return str(rng.choice(list(shares), p=list(shares.values())))


def _located(rng: np.random.Generator, scene: scenes.Scene, whole: View) -> list[scenes.QA]:
    """Questions, each answered by the part of the picture that holds the evidence, which is told of print too small to read as well."""
    found = []
    for qa in _balanced(rng, [qa for qa in scene.qas if qa.kind != "place" and qa.answer_boxes]):
        boxes = tuple(dict.fromkeys((*qa.question_boxes, *qa.answer_boxes)))
        if all(whole.holds(box) for box in boxes):
            answers = (_part(scene, boxes),)
            found.append(replace(qa, kind="place", answers=answers, answer_boxes=boxes, form=0, small=False))
    return found


def _unread(qa: scenes.QA) -> scenes.QA:
    """A question about something too small to read, with the answer that it is."""
    boxes = qa.answer_boxes or qa.question_boxes
    return replace(qa, kind="unread", answers=(lex.UNREAD,), form=0, small=False, answer_boxes=boxes)


def _part(scene: scenes.Scene, boxes: tuple[scenes.PixelBox, ...]) -> str:
    """The word for the smallest part of a scene that holds boxes, of equals the nearest."""
    width, height = scene.image.size
    x0, y0, x1, y1 = crops.box_union(boxes)  # it may stand out of the picture by a pixel
    edges = (x0 / width, y0 / height, x1 / width, y1 / height)
    box = tuple(min(1000, max(0, round(1000 * edge))) for edge in edges)
    return crops.coverage_rule([box], CROP_SETTINGS)[0]


def _answerable(qa: scenes.QA, kind: str, views: list[View]) -> bool:
    """Whether what is shown lets a reader answer: only legible evidence, and no global question about a part."""
    if kind == "part" and qa.kind in ("place", "count"):
        return False
    return any(shows(one, qa) for one in views)


def shows(one: View, qa: scenes.QA) -> bool:
    """Whether the evidence of a question is legible in a view."""
    return not (qa.small and one.scale < 1) and all(one.holds(box) for box in (*qa.question_boxes, *qa.answer_boxes))


def _balanced(rng: np.random.Generator, qas: list[scenes.QA], twice: tuple[str, ...] = ()) -> list[scenes.QA]:
    """Kinds in turn, so that the many fields of a page do not drown the rest; two a turn of those that come ``twice``."""
    by_kind: dict[str, list[scenes.QA]] = {}
    for index in rng.permutation(len(qas)):
        by_kind.setdefault(qas[index].kind, []).append(qas[index])
    picked = []
    while by_kind:
        for kind in list(by_kind):
            for _ in range(2 if kind in twice else 1):
                if by_kind[kind]:
                    picked.append(by_kind[kind].pop())
            if not by_kind[kind]:
                del by_kind[kind]
    return [picked[i] for i in rng.permutation(min(len(picked), 12))] if picked else []


_VERBS = "open search move play paint order find send book light crop mark save print see call".split()
_ARGUMENTS = "regions places items names target colour city day count arguments".split()


class Function(NamedTuple):
    """A function that a system message offers, never the crop tool."""

    name: str
    argument: str
    offered: list[str]  # what the argument may hold
    words: list[str]  # what it holds

    @classmethod
    def drawn(cls, rng: np.random.Generator, of_places: bool = False) -> "Function":
        """A random function whose argument holds things, or places alone."""
        pool = [*lex.PLACES, "top", "bottom", "left", "right", "all"]
        pool += [] if of_places else [*lex.SHAPES, *lex.ITEMS, *lex.CITIES]
        offered = [str(w) for w in rng.choice(pool, int(rng.integers(3, 8)), replace=False)]
        words = offered[: int(rng.integers(1, 4))]
        verb, argument = str(rng.choice(_VERBS)), str(rng.choice(_ARGUMENTS))
        return cls(f"{verb}_{rng.choice(lex.ANIMALS)}", argument, offered, words)

    @property
    def verb(self) -> str:
        return self.name.split("_")[0]

    def _json(self, words: list[str]) -> str:
        return json.dumps({"name": self.name, "arguments": {self.argument: words}})

    def offer(self) -> str:
        return f"\n<tools>\n{self._json(self.offered)}\n</tools>"

    def call(self, words: list[str]) -> str:
        return f"<tool_call>\n{self._json(words)}\n</tool_call>"


def text_example(rng: np.random.Generator) -> Example:
    """Text alone: call a function that the system message offers and report its result, or repeat words.

    Between them every token of a tool call and of its answer is used.
    """
    function = Function.drawn(rng)
    verb, words = function.verb, function.words
    others = rng.choice(lex.SYSTEMS[1:], int(rng.integers(0, 3)), replace=False)
    system = " ".join([lex.SYSTEMS[0], *(str(text) for text in others)])
    draw = rng.random()
    if draw < 0.7:
        function = function._replace(offered=rng.permutation(function.offered).tolist())
        result = " ".join(str(w) for w in rng.choice(WORDS, int(rng.integers(1, 3))))
        if rng.random() < 0.15:
            result = f"error: no such {result}"
        turns = [(f"{verb} {' and '.join(words)}.", function.call(words))]
        turns += [(f"<tool_response>\n{result}\n</tool_response>", result)]
        return Example(turns=turns, system=system + function.offer())
    if draw < 0.85:
        return Example(turns=[(f"repeat as a list: {' and '.join(words)}", json.dumps(words))], system=system)
    text = f"{function.argument} {verb} {' '.join(words)}"
    return Example(turns=[(f"repeat: {text}", text)], system=system)
