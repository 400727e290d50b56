"""Pages, charts, signs and scenes of the embedded suite, drawn from a seed.

A :class:`Scene` is a picture together with all that is printed on it (:class:`Mark`) and every question that it can answer
(:class:`QA`). Two sizes of evidence are drawn and nothing between: *small* (text of 15 to 17 px, objects of 16 to 19 px), which
reads at full resolution only, and *large* (text of 32 to 36 px, objects of 36 to 43 px), which survives halving.
What a question names (a key, a coloured sign, a carrier, a colour) is large, and what it asks for is of either size: so half resolution
shows where to look, as it mostly does in real pictures, and often not what stands there. The question is drawn independently of
the size and cannot tell whether a crop is needed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from awares.mini import vocabulary as lex

Box = tuple[float, float, float, float]
SMALL_TEXT, LARGE_TEXT = (15, 18), (32, 37)  # px, half-open: legible at full only; legible at half too
SMALL_OBJECT, LARGE_OBJECT = (16, 20), (36, 44)
FONTS = {"sans": "DejaVuSans.ttf", "serif": "DejaVuSerif.ttf"}
SIZES = (
    (224, 336),
    (336, 224),
    (280, 280),
    (280, 336),
    (336, 280),
    (336, 336),
    (224, 448),
    (448, 224),
    (280, 392),
    (392, 280),
)


@dataclass(frozen=True)
class Mark:
    """One printed word or drawn object: `text` in lower case, `box` in px, `size` the font or object size in px."""

    text: str
    box: Box
    size: float
    colour: str = ""
    chars: tuple[tuple[str, float], ...] = ()  # (character, x of its centre in px)


@dataclass(frozen=True)
class QA:
    """A question about a scene. `answers[0]` is the printed form, the others are accepted; boxes are in px."""

    kind: str
    question: str
    answers: tuple[str, ...]
    question_boxes: tuple[Box, ...]
    answer_boxes: tuple[Box, ...]
    small: bool
    subject: str = ""
    form: int = 0  # which of `answers` this phrasing calls for (base training only)


@dataclass
class Scene:
    image: Image.Image
    marks: list[Mark] = field(default_factory=list)
    qas: list[QA] = field(default_factory=list)
    ambiguous: list[QA] = field(default_factory=list)  # values whose subject stands there twice: never asked
    jpeg: bytes = b""  # the captured picture as a file


# --- drawing ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONTS[face]), size)


@lru_cache(maxsize=65536)
def _advance(face: str, size: int, text: str) -> float:
    return _font(face, size).getlength(text)


@lru_cache(maxsize=256)
def _extent(face: str, size: int) -> tuple[int, int]:
    """Top and bottom of a line of text below its anchor, in px: the same for every word of a size."""
    _, top, _, bottom = _font(face, size).getbbox("bdpq")
    return int(top), int(bottom)


@dataclass(frozen=True)
class Pen:
    face: str
    size: int
    fill: tuple[int, int, int]
    case: str = "lower"

    @property
    def small(self) -> bool:
        return self.size < LARGE_TEXT[0]

    def cased(self, text: str) -> str:
        return {"lower": text, "title": text.title()}[self.case]

    def width(self, text: str) -> float:
        return _advance(self.face, self.size, self.cased(text))

    @property
    def height(self) -> int:
        top, bottom = _extent(self.face, self.size)
        return bottom - top


class Entry(NamedTuple):
    """A key and its value on a page or chart; `small` is the value, keys are large."""

    key: str
    key_box: Box
    value: tuple[str, ...]
    value_box: Box
    small: bool


class Canvas:
    """A picture being drawn, and the record of what stands on it."""

    def __init__(self, size: tuple[int, int], background: np.ndarray) -> None:
        self.width, self.height = size
        self.image = Image.fromarray(background)
        self.draw = ImageDraw.Draw(self.image)
        self.marks: list[Mark] = []

    def text(self, x: float, y: float, text: str, pen: Pen) -> Box:
        """Write `text` with its top left corner at (x, y); one mark a word; returns the box of the whole."""
        top, bottom = _extent(pen.face, pen.size)
        start, right = round(x), x
        for word in text.split(" "):
            shown = pen.cased(word)
            self.draw.text((start, round(y) - top), shown, font=_font(pen.face, pen.size), fill=pen.fill)
            right = start + _advance(pen.face, pen.size, shown)
            edges = [start + _advance(pen.face, pen.size, shown[:i]) for i in range(len(shown) + 1)]
            chars = tuple((c.lower(), (a + b) / 2) for c, a, b in zip(shown, edges, edges[1:], strict=False))
            self.marks.append(Mark(word.lower(), (start, y, right, y + bottom - top), pen.size, chars=chars))
            start = round(right + _advance(pen.face, pen.size, " "))
        return (x, y, right, y + bottom - top)

    def object(self, x: int, y: int, side: int, shape: str, colour: str, rng: np.random.Generator) -> Mark:
        """Draw a shape with its top left corner at (x, y); no colour: white."""
        mask = _shape_mask(shape, side)
        self.image.paste(tint(lex.COLOURS.get(colour, (245, 245, 245)), rng, 10), (x, y), mask)
        self.marks.append(Mark(shape, (float(x), float(y), float(x + side), float(y + side)), side, colour))
        return self.marks[-1]


def tint(colour: Sequence[int], rng: np.random.Generator, spread: int) -> tuple[int, int, int]:
    r, g, b = np.clip(np.asarray(colour) + rng.integers(-spread, spread + 1, 3), 0, 255).tolist()
    return r, g, b


@lru_cache(maxsize=1024)
def _shape_mask(shape: str, side: int) -> Image.Image:
    """Anti-aliased mask of a unit polygon (or of what an ellipse leaves), side px square."""
    big = side * 8
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)
    for points, value in lex.SHAPES[shape]:
        if len(points) == 2:
            draw.ellipse([c * (big - 1) for p in points for c in p], fill=value)
        else:
            draw.polygon([(px * big, py * big) for px, py in points], fill=value)
    return mask.resize((side, side), Image.Resampling.BOX)


def background(size: tuple[int, int], base: Sequence[int], rng: np.random.Generator, texture: float) -> np.ndarray:
    """A tinted ground with a soft gradient and a coarse texture, uint8 (H, W, 3)."""
    width, height = size
    coarse = rng.normal(0, texture, (height // 14 + 2, width // 14 + 2)).astype(np.float32)
    cloud = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    slope = rng.normal(0, 8, 2)
    ramp = slope[0] * np.linspace(-1, 1, width)[None, :] + slope[1] * np.linspace(-1, 1, height)[:, None]
    return np.clip(np.asarray(base, np.float32) + (cloud + ramp)[..., None], 0, 255).astype(np.uint8)


def capture(image: Image.Image, rng: np.random.Generator) -> bytes:
    """What a camera or scanner makes of it, as a JPEG file: slight blur, uneven exposure, sensor noise, compression."""
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.45))))
    pixels = np.asarray(image, np.float32)
    pixels = pixels * rng.uniform(0.88, 1.04) + rng.standard_normal(pixels.shape, np.float32) * rng.uniform(2, 8)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=int(rng.integers(60, 93)))
    return buffer.getvalue()


def _pen(rng: np.random.Generator, small: bool, dark: bool = True) -> Pen:
    size = int(rng.integers(*(SMALL_TEXT if small else LARGE_TEXT)))
    face = str(rng.choice(["sans", "serif"]))
    fill = tint((30, 30, 40) if dark else (240, 240, 235), rng, 25)
    return Pen(face, size, fill, str(rng.choice(["lower", "title"])))


def _ask(rng: np.random.Generator, kind: str, answers: Sequence[str], **slots: str) -> tuple[str, int]:
    """A phrasing of `kind`; the last third of the phrasings calls for the answer's second surface form."""
    phrasings = lex.PHRASINGS[kind]
    index = int(rng.integers(len(phrasings)))
    form = min(len(answers) - 1, 1) if index >= len(phrasings) * 2 // 3 else 0
    return phrasings[index].format(**slots), form


# --- documents -------------------------------------------------------------------------------------------------------


def page(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """A filled form, price list or roster: lines of `key: value` entries, values large or small (mirrors DocVQA)."""
    canvas = Canvas(size, background(size, tint((242, 240, 232), rng, 10), rng, 2.0))
    entries: list[Entry] = []
    keys = lex.Deck(rng)
    theme, y = keys.theme(), float(rng.integers(3, 12))
    key_pen = _pen(rng, False)
    while y + key_pen.height + 2 <= size[1]:
        x = float(rng.integers(4, 14))
        while entry := _field(canvas, keys, theme, x, y, key_pen, _pen(rng, bool(rng.random() < 0.55)), rng):
            entries.append(entry)
            x = entry.value_box[2] + float(rng.integers(10, 26))
        y += key_pen.height + int(rng.integers(3, 8))
        if rng.random() < 0.3:
            theme, key_pen = keys.theme(), _pen(rng, False)
    return _finish_page(rng, canvas, entries)


def _field(
    canvas: Canvas,
    keys: lex.Deck,
    theme: str,
    x: float,
    y: float,
    key_pen: Pen,
    pen: Pen,
    rng: np.random.Generator,
    unit: str = "",
) -> Entry | None:
    """One entry on a line, its value aligned somewhere along the key's height; None where no more fits."""
    value = lex.forms(unit, rng) if unit else lex.value(theme, rng)
    value_x = x + pen.size * rng.uniform(0.5, 1.0)
    key = keys.fitting(
        theme, lambda word: value_x + key_pen.width(word + ":") + pen.width(value[0]) + 4 <= canvas.width
    )
    if key is None:
        return None
    key_box = canvas.text(x, y, key + ":", key_pen)
    value_y = y + rng.uniform(0, max(0, key_pen.height - pen.height))
    return Entry(
        key, key_box, value, canvas.text(value_x + key_pen.width(key + ":"), value_y, value[0], pen), pen.small
    )


def _finish_page(
    rng: np.random.Generator, canvas: Canvas, entries: list[Entry], kinds: tuple[str, str] = ("field", "pair")
) -> Scene:
    qas = []
    for key, key_box, value, value_box, small in entries:
        question, form = _ask(rng, kinds[0], value, k=key)
        qas.append(QA(kinds[0], question, value, (key_box,), (value_box,), small, key, form))
        qas.append(_where(rng, key, key, key_box, value_box, canvas))
    for group in (False, True):
        qas += _pairs(rng, [e for e in entries if e.small == group], kinds[1])
    return Scene(canvas.image, canvas.marks, qas)


def _where(rng: np.random.Generator, subject: str, shown: str, named: Box, found: Box, canvas: Canvas) -> QA:
    """Where something lies; half resolution shows it. Asked in base training only."""
    place = lex.place((found[0] + found[2]) / 2 / canvas.width, (found[1] + found[3]) / 2 / canvas.height)
    question, form = _ask(rng, "place", place, s=shown)
    return QA("place", question, place, (named,), (found,), False, subject, form)


def _pairs(rng: np.random.Generator, entries: list[Entry], kind: str, count: int = 3) -> list[QA]:
    """Questions that need two entries, which may stand far apart: evidence that spans a half or the whole."""
    qas = []
    for _ in range(count if len(entries) > 1 else 0):
        first, second = (entries[i] for i in rng.choice(len(entries), 2, replace=False))
        answers = tuple(f"{a} and {b}" for a, b in zip(_spread(first.value), _spread(second.value), strict=True))
        question, form = _ask(rng, kind, answers, a=first.key, b=second.key)
        boxes = (first.key_box, second.key_box), (first.value_box, second.value_box)
        qas.append(QA(kind, question, answers, *boxes, first.small, f"{first.key}+{second.key}", form))
    return qas


def _spread(forms: tuple[str, ...]) -> tuple[str, str]:
    return forms[0], forms[min(1, len(forms) - 1)]


# --- charts ----------------------------------------------------------------------------------------------------------


def chart(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Upright or lying bars, each with its category and its value (mirrors ChartQA). Bars differ in text size."""
    canvas = Canvas(size, background(size, tint((250, 250, 250), rng, 5), rng, 1.0))
    keys = lex.Deck(rng)
    theme = keys.theme()
    unit = str(rng.choice(["number", "percent", "money"]))
    draw = _lying_bars if rng.random() < 0.6 else _upright_bars
    return _finish_page(rng, canvas, draw(canvas, keys, theme, unit, rng), ("bar", "bars"))


def _lying_bars(canvas: Canvas, keys: lex.Deck, theme: str, unit: str, rng: np.random.Generator) -> list[Entry]:
    """Each line: the category, its value, its bar."""
    entries, y = [], float(rng.integers(4, 12))
    colour = tint(lex.COLOURS[str(rng.choice(list(lex.COLOURS)))], rng, 20)
    key_pen = _pen(rng, False)
    height = key_pen.height + int(rng.integers(3, 7))
    while y + height <= canvas.height - 2:
        entry = _field(canvas, keys, theme, 4, y + 2, key_pen, _pen(rng, bool(rng.random() < 0.55)), rng, unit)
        if entry is None:
            break
        left = entry.value_box[2] + 8
        length = max(3.0, (canvas.width - left - 6) * lex.amount(entry.value[0]) / 100)
        canvas.draw.rectangle((left, y + 1, left + length, y + height - 2), fill=colour)
        entries.append(entry)
        y += height + int(rng.integers(1, 6))
    return entries


def _narrow(pen: Pen, room: float, word: str) -> bool:
    return pen.width(word) <= room


def _upright_bars(canvas: Canvas, keys: lex.Deck, theme: str, unit: str, rng: np.random.Generator) -> list[Entry]:
    """Under each bar: its category, and its value below that."""
    entries: list[Entry] = []
    x = float(rng.integers(4, 10))
    colour = tint(lex.COLOURS[str(rng.choice(list(lex.COLOURS)))], rng, 20)
    floor = canvas.height - int(rng.integers(78, 92))
    key_pen = _pen(rng, False)
    while True:
        pen, value = _pen(rng, bool(rng.random() < 0.55)), lex.forms(unit, rng)
        room = canvas.width - 2 - x - 4
        key = keys.fitting(theme, partial(_narrow, key_pen, room)) if pen.width(value[0]) <= room else None
        if key is None:
            return entries
        width = max(key_pen.width(key), pen.width(value[0])) + 4
        height = max(3.0, (floor - 20) * lex.amount(value[0]) / 100)
        canvas.draw.rectangle((x + 2, floor - height, x + width - 6, floor), fill=colour)
        key_box = canvas.text(x, floor + 4, key, key_pen)
        value_box = canvas.text(x, floor + 4 + key_pen.height + int(rng.integers(2, 5)), value[0], pen)
        entries.append(Entry(key, key_box, value, value_box, pen.small))
        x += width + int(rng.integers(3, 10))


# --- signs and scenes ------------------------------------------------------------------------------------------------


def _free_spot(
    rng: np.random.Generator, taken: list[Box], width: float, height: float, size: tuple[int, int]
) -> tuple[int, int] | None:
    for _ in range(20):
        if width + 4 >= size[0] or height + 4 >= size[1]:
            return None
        x, y = (int(rng.integers(2, int(s - w - 1))) for s, w in zip(size, (width, height), strict=True))
        if all(x > b[2] + 3 or x + width < b[0] - 3 or y > b[3] + 3 or y + height < b[1] - 3 for b in taken):
            taken.append((x, y, x + width, y + height))
            return x, y
    return None


def signs(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Coloured signs with words and numbers before a textured wall (mirrors TextVQA and OCRBench)."""
    canvas = Canvas(size, background(size, tint((135, 135, 130), rng, 35), rng, 10.0))
    taken: list[Box] = []
    qas = []
    for colour in rng.permutation(list(lex.COLOURS)).tolist():
        small = bool(rng.random() < 0.5)
        panel = tint(lex.COLOURS[colour], rng, 12)
        pen = _pen(rng, small, dark=sum(panel) > 380)
        text = lex.sign(rng)
        line = pen.width(text[0])
        width, height = line + int(rng.integers(8, 60)), float(pen.height + int(rng.integers(8, 50)))
        spot = _free_spot(rng, taken, width, height, size)
        if spot is None:
            continue
        x, y = spot
        canvas.draw.rounded_rectangle((x, y, x + width, y + height), radius=int(rng.integers(0, 7)), fill=panel)
        box = canvas.text(
            x + rng.uniform(3, width - line - 3), y + rng.uniform(3, height - pen.height - 3), text[0], pen
        )
        panel_mark = Mark("sign", (x, y, x + width, y + height), min(width, height), colour)
        canvas.marks.append(panel_mark)
        question, form = _ask(rng, "sign", text, c=colour)
        qas.append(QA("sign", question, text, (panel_mark.box,), (box,), small, colour, form))
        qas.append(_where(rng, colour, f"the {colour} sign", panel_mark.box, box, canvas))
    return Scene(canvas.image, canvas.marks, qas)


def objects(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Coloured objects, those of a colour all near or all far; near ones may carry a number or a badge (mirrors POPE, RealWorldQA, V*Bench)."""
    canvas = Canvas(size, background(size, tint((205, 205, 195), rng, 30), rng, 9.0))
    taken: list[Box] = []
    placed: list[Mark] = []
    carried: list[tuple[Mark, str, tuple[str, ...], Box, bool]] = []
    colours = [str(c) for c in rng.permutation(list(lex.COLOURS))[: int(rng.integers(4, 7))]]
    far = {colour: bool(rng.random() < 0.45) for colour in colours}
    shapes = {colour: rng.choice(list(lex.SHAPES), 3, replace=False).tolist() for colour in colours}
    for _ in range(int(rng.integers(9, 15))):
        colour = str(rng.choice(colours))
        side = int(rng.integers(*(SMALL_OBJECT if far[colour] else LARGE_OBJECT)))
        load = "" if far[colour] else str(rng.choice(["plate", "badge", ""], p=[0.35, 0.35, 0.3]))
        small = bool(rng.random() < 0.5)
        pen, number = _pen(rng, small), lex.forms("number", rng)
        badge = int(rng.integers(*(SMALL_OBJECT if small else LARGE_OBJECT)))
        width = max(side, {"plate": pen.width(number[0]), "badge": badge + 6, "": 0}[load])
        height = side + {"plate": pen.height + 3, "badge": badge + 8, "": 0}[load]
        spot = _free_spot(rng, taken, width, height, size)
        if spot is None:
            continue
        x, y = spot
        placed.append(canvas.object(x, y, side, str(rng.choice(shapes[colour])), colour, rng))
        if load == "plate":
            carried.append((placed[-1], load, number, canvas.text(x, y + side + 2, number[0], pen), small))
        elif load == "badge":
            canvas.draw.rounded_rectangle(
                (x, y + side + 2, x + badge + 5, y + side + badge + 7), 3, fill=tint((70, 70, 80), rng, 15)
            )
            mark = canvas.object(x + 3, y + side + 5, badge, str(rng.choice(list(lex.SHAPES))), "", rng)
            carried.append((placed[-1], load, (mark.text,), mark.box, small))
    names = [f"{mark.colour} {mark.text}" for mark in placed]
    qas = _groups(rng, placed, far)
    ambiguous: list[QA] = []
    for carrier, kind, answers, box, small in carried:
        subject = f"{carrier.colour} {carrier.text}"
        question, form = _ask(rng, kind, answers, o=subject)
        qa = QA(kind, question, answers, (carrier.box,), (box,), small, subject, form)
        (qas if names.count(subject) == 1 else ambiguous).append(qa)
    for mark, name in zip(placed, names, strict=True):
        if names.count(name) == 1 and not far[mark.colour]:
            qas.append(_where(rng, name, f"the {name}", mark.box, mark.box, canvas))
    return Scene(canvas.image, canvas.marks, qas, ambiguous)


def _groups(rng: np.random.Generator, placed: list[Mark], far: dict[str, bool]) -> list[QA]:
    """Is there a red star, and how many? The evidence is every object of that colour, the look-alikes too, so it often spans a half or the whole."""
    qas = []
    for colour in {mark.colour: 0 for mark in placed}:
        alike = [mark for mark in placed if mark.colour == colour]
        boxes = tuple(mark.box for mark in alike)
        present = str(rng.choice([mark.text for mark in alike]))
        absent = str(rng.choice([shape for shape in lex.SHAPES if all(mark.text != shape for mark in alike)]))
        for shape, answer in ((present, "yes"), (absent, "no")):
            question, form = _ask(rng, "presence", (answer,), o=f"{colour} {shape}")
            qas.append(
                QA(
                    "presence",
                    question,
                    (answer,),
                    boxes,
                    boxes if shape == present else (),
                    far[colour],
                    f"{colour} {shape}",
                    form,
                )
            )
        for shape in {mark.text: 0 for mark in alike}:
            count = sum(mark.text == shape for mark in alike)
            answers = (str(count), lex.NUMBER_WORDS[count])
            question, form = _ask(rng, "count", answers, o=f"{colour} {shape}")
            qas.append(QA("count", question, answers, boxes, boxes, far[colour], f"{colour} {shape}", form))
    return qas


def collage(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Two or four pictures pasted into one (mirrors LLaVA-Multi): a question names what only one of them holds."""
    columns, rows = (2, 2) if min(size) >= 280 and rng.random() < 0.3 else ((2, 1) if size[0] >= size[1] else (1, 2))
    image = Image.new("RGB", size, (128, 128, 128))
    marks: list[Mark] = []
    every: list[QA] = []
    ambiguous: list[QA] = []
    for row in range(rows):
        for column in range(columns):
            inner = (size[0] // columns - 2, size[1] // rows - 2)
            scene = PAINTERS[str(rng.choice(["page", "chart", "signs", "objects"]))](rng, inner)
            dx, dy = column * size[0] // columns + 1, row * size[1] // rows + 1
            image.paste(scene.image, (dx, dy))
            marks += [_shift_mark(m, dx, dy) for m in scene.marks]
            every += [_shift_qa(q, dx, dy) for q in scene.qas if q.kind in ("field", "bar", "sign", "badge", "plate")]
            ambiguous += [_shift_qa(q, dx, dy) for q in scene.ambiguous]
    subjects = [q.subject for q in every]
    names = [m.text.rstrip(":") for m in marks]
    named = ("field", "bar")  # by a word that may stand in another picture too
    qas = [q for q in every if subjects.count(q.subject) == 1 and (q.kind not in named or names.count(q.subject) == 1)]
    return Scene(image, marks, qas, ambiguous + [q for q in every if q not in qas])


def wall(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Line upon line of words, of which nothing is asked: what the vision tower learns to read from (base training only)."""
    canvas = Canvas(size, background(size, tint((242, 240, 232), rng, 10), rng, 2.0))
    for x, y, pen in _lines(canvas, rng):
        while x + pen.width(word := _loose(rng)) + 1 <= size[0]:
            x = canvas.text(x, y, word, pen)[2] + float(rng.uniform(3, 8)) * pen.size / 14
    return Scene(canvas.image, canvas.marks)


def ledger(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Line upon line of `key: value`, a value of one word or two: what it learns whose value is whose from (base training only)."""
    canvas = Canvas(size, background(size, tint((242, 240, 232), rng, 10), rng, 2.0))
    keys = [word for theme in lex.THEMES.values() for word in theme]
    qas = []
    for x, y, pen in _lines(canvas, rng):
        smaller = int(rng.integers(SMALL_TEXT[0], min(SMALL_TEXT[1], pen.size + 1)))
        other = replace(pen, size=smaller) if rng.random() < 0.5 else pen
        while True:
            key = keys[int(rng.integers(len(keys)))]
            value = " ".join(_loose(rng).rstrip(":") for _ in range(int(rng.integers(1, 3))))
            gap = pen.size * rng.uniform(0.3, 1.0)
            if x + pen.width(f"{key}:") + gap + other.width(value) + 8 > size[0]:
                break
            named = canvas.text(x, y, f"{key}:", pen)
            lower = rng.uniform(0, max(0, pen.height - other.height))
            found = canvas.text(named[2] + gap, y + lower, value, other)
            qas.append(QA("field", "", (value,), (named,), (found,), other.small, key))
            x = found[2] + float(rng.uniform(6, 20))
    return Scene(canvas.image, canvas.marks, ambiguous=qas)


def _lines(canvas: Canvas, rng: np.random.Generator) -> Iterator[tuple[float, float, Pen]]:
    """Where lines of print begin, and the pen of each: mostly small and dark on paper, some light on a coloured bar."""
    y = float(rng.integers(0, 8))
    while True:
        dark = bool(rng.random() < 0.75)
        pen = _pen(rng, bool(rng.random() < 0.75), dark)
        if y + pen.height + 2 > canvas.height:
            return
        if not dark:
            ground = tint(list(lex.COLOURS.values())[int(rng.integers(len(lex.COLOURS)))], rng, 15)
            if sum(ground) < 480:
                canvas.draw.rectangle((0, round(y) - 2, canvas.width, round(y) + pen.height + 1), fill=ground)
            else:
                pen = replace(pen, fill=tint((30, 30, 40), rng, 25))
        yield float(rng.integers(0, 8)), y, pen
        y += pen.height + float(rng.integers(1, 5))


@lru_cache(maxsize=1)
def _printed() -> list[str]:
    """Every word that is printed somewhere."""
    return [
        w for words in (*lex.THEMES.values(), *lex.WORD_VALUES.values(), lex.SHOP, lex.SHAPES, ("kg",)) for w in words
    ]


def _loose(rng: np.random.Generator) -> str:
    """A word or a number, with or without a sign."""
    dice = rng.random()
    if rng.random() < 0.25:
        number = str(rng.integers(100))
        return f"{number}:" if dice < 0.15 else f"{number}%" if dice < 0.3 else f"${number}" if dice < 0.45 else number
    word = _printed()[int(rng.integers(len(_printed())))]
    return f"{word}:" if dice < 0.15 else word


def _shift(box: Box, dx: float, dy: float) -> Box:
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy


def _shift_mark(mark: Mark, dx: float, dy: float) -> Mark:
    return replace(mark, box=_shift(mark.box, dx, dy), chars=tuple((c, x + dx) for c, x in mark.chars))


def _shift_qa(qa: QA, dx: float, dy: float) -> QA:
    return replace(
        qa,
        question_boxes=tuple(_shift(b, dx, dy) for b in qa.question_boxes),
        answer_boxes=tuple(_shift(b, dx, dy) for b in qa.answer_boxes),
    )


def draw(name: str, rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Scene `name` of PAINTERS on `size` px, as it was designed."""
    return PAINTERS[name](rng, size)


def paint(name: str, rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Scene `name` of PAINTERS on `size` px, as a camera or scanner captured it."""
    scene = draw(name, rng, size)
    scene.jpeg = capture(scene.image, rng)
    scene.image = Image.open(io.BytesIO(scene.jpeg)).convert("RGB")
    return scene


PAINTERS = {
    "page": page,
    "chart": chart,
    "signs": signs,
    "objects": objects,
    "collage": collage,
    "wall": wall,
    "ledger": ledger,
}
