"""Pages, charts, signs and scenes of the embedded suite, drawn from a seed.

A :class:`Scene` is a picture together with all that is printed on it (:class:`Mark`) and every question that it can answer
(:class:`QA`). Two sizes of evidence are drawn and nothing between: *small* (text of 13 to 15 px, objects of 13 to 15 px), which
reads at full resolution only, and *large* (text of 26 to 30 px, objects of 27 to 36 px), which survives halving.
The question is drawn independently of the size, so it cannot tell whether a crop is needed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from awares import lexicon as lex

Box = tuple[float, float, float, float]
SMALL_TEXT, LARGE_TEXT = (13, 16), (26, 31)  # px, half-open: legible at full only; legible at half too
SMALL_OBJECT, LARGE_OBJECT = (13, 16), (27, 37)
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

    def cased(self, text: str) -> str:
        return {"lower": text, "title": text.title()}[self.case]

    def width(self, text: str) -> float:
        return _advance(self.face, self.size, self.cased(text))

    @property
    def height(self) -> int:
        top, bottom = _extent(self.face, self.size)
        return bottom - top


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

    def object(self, x: int, y: int, side: int, shape: str, colour: str, rng: np.random.Generator) -> Box:
        mask = _shape_mask(shape, side)
        self.image.paste(tint(lex.COLOURS[colour], rng, 14), (x, y), mask)
        box = (float(x), float(y), float(x + side), float(y + side))
        self.marks.append(Mark(shape, box, side, colour))
        return box


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
    """A filled form, price list or roster: blocks of `key: value` rows, some large, most small (mirrors DocVQA)."""
    canvas = Canvas(size, background(size, tint((242, 240, 232), rng, 10), rng, 2.0))
    entries: list[tuple[str, Box, tuple[str, ...], Box, bool]] = []
    keys = lex.Deck(rng)
    y = float(rng.integers(3, 12))
    small = bool(rng.random() < 0.5)
    while True:
        pen = _pen(rng, small)
        theme = keys.theme()
        rows = int(rng.integers(3, 8)) if small else int(rng.integers(1, 4))
        columns = 2 if small and size[0] >= 280 and rng.random() < 0.5 else 1
        pitch = pen.height + int(rng.integers(3, 7))
        for _ in range(rows):
            if y + pen.height + 2 > size[1]:
                return _finish_page(rng, canvas, entries)
            for column in range(columns):
                left = 4 + column * size[0] / columns + int(rng.integers(0, 6))
                entry = _field(canvas, keys, theme, left, y, (column + 1) * size[0] / columns - 4, pen, rng)
                if entry:
                    entries.append((*entry, small))
            y += pitch
        y += int(rng.integers(2, 9))
        small = not small if rng.random() < 0.85 else small


def _field(canvas: Canvas, keys: lex.Deck, theme: str, left: float, y: float, right: float, pen: Pen,
           rng: np.random.Generator) -> tuple[str, Box, tuple[str, ...], Box] | None:  # fmt: skip
    key, value = keys.key(theme), lex.value(theme, rng)
    if key is None:
        return None
    key_width, value_width = pen.width(key + ":"), pen.width(value[0])
    if left + key_width + value_width + pen.size > right:
        return None
    key_box = canvas.text(left, y, key + ":", pen)
    return key, key_box, value, canvas.text(left + key_width + pen.size * rng.uniform(0.5, 1.0), y, value[0], pen)


def _finish_page(rng: np.random.Generator, canvas: Canvas, entries: list) -> Scene:
    qas = []
    for key, key_box, value, value_box, small in entries:
        question, form = _ask(rng, "field", value, k=key)
        qas.append(QA("field", question, value, (key_box,), (value_box,), small, key, form))
    for group in (False, True):
        qas += _pairs(rng, [e for e in entries if e[4] == group], "pair")
    return Scene(canvas.image, canvas.marks, qas)


def _pairs(rng: np.random.Generator, entries: list, kind: str, count: int = 3) -> list[QA]:
    """Questions that need two entries, which may stand far apart: evidence that spans a half or the whole."""
    qas = []
    for _ in range(count if len(entries) > 1 else 0):
        first, second = (entries[i] for i in rng.choice(len(entries), 2, replace=False))
        answers = tuple(f"{a} and {b}" for a, b in zip(_spread(first[2]), _spread(second[2]), strict=True))
        question, form = _ask(rng, kind, answers, a=first[0], b=second[0])
        boxes = (first[1], second[1]), (first[3], second[3])
        qas.append(QA(kind, question, answers, *boxes, first[4], f"{first[0]}+{second[0]}", form))
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
    entries = draw(canvas, keys, theme, unit, rng)
    qas = []
    for key, key_box, value, value_box, small in entries:
        question, form = _ask(rng, "bar", value, k=key)
        qas.append(QA("bar", question, value, (key_box,), (value_box,), small, key, form))
    for group in (False, True):
        qas += _pairs(rng, [e for e in entries if e[4] == group], "bars")
    return Scene(canvas.image, canvas.marks, qas)


def _lying_bars(canvas: Canvas, keys: lex.Deck, theme: str, unit: str, rng: np.random.Generator) -> list:
    """Each line: the category, its value, its bar."""
    entries, y = [], float(rng.integers(4, 12))
    colour = tint(lex.COLOURS[str(rng.choice(list(lex.COLOURS)))], rng, 20)
    while (key := keys.key(theme)) is not None:
        small = bool(rng.random() < 0.6)
        pen = _pen(rng, small)
        height = pen.height + int(rng.integers(4, 9))
        if y + height > canvas.height - 2:
            break
        value = lex.forms(unit, rng)
        key_box = canvas.text(4, y + 2, key, pen)
        value_box = canvas.text(key_box[2] + pen.size * rng.uniform(0.5, 1.0), y + 2, value[0], pen)
        left = value_box[2] + 8
        length = max(3.0, (canvas.width - left - 6) * lex.amount(value[0]) / 100)
        canvas.draw.rectangle((left, y + 1, left + length, y + height - 2), fill=colour)
        entries.append((key, key_box, value, value_box, small))
        y += height + int(rng.integers(2, 7))
    return entries


def _upright_bars(canvas: Canvas, keys: lex.Deck, theme: str, unit: str, rng: np.random.Generator) -> list:
    """Under each bar: its category, and its value below that."""
    entries, x = [], float(rng.integers(4, 10))
    colour = tint(lex.COLOURS[str(rng.choice(list(lex.COLOURS)))], rng, 20)
    floor = canvas.height - int(rng.integers(70, 84))
    while (key := keys.key(theme)) is not None:
        small = bool(rng.random() < 0.6)
        pen = _pen(rng, small)
        value = lex.forms(unit, rng)
        width = max(pen.width(key), pen.width(value[0])) + 4
        if x + width > canvas.width - 2:
            break
        height = max(3.0, (floor - 20) * lex.amount(value[0]) / 100)
        canvas.draw.rectangle((x + 2, floor - height, x + width - 6, floor), fill=colour)
        key_box = canvas.text(x, floor + 4, key, pen)
        value_box = canvas.text(x, floor + 4 + pen.height + int(rng.integers(2, 5)), value[0], pen)
        entries.append((key, key_box, value, value_box, small))
        x += width + int(rng.integers(3, 10))
    return entries


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
    return Scene(canvas.image, canvas.marks, qas)


def objects(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Coloured objects, near and far, some with a number plate (mirrors POPE, RealWorldQA and V*Bench)."""
    canvas = Canvas(size, background(size, tint((205, 205, 195), rng, 30), rng, 9.0))
    taken: list[Box] = []
    placed: list[tuple[str, str, Box, bool]] = []
    plates: list[QA] = []
    shapes = rng.permutation(list(lex.SHAPES)).tolist()
    colours = [str(c) for c in rng.permutation(list(lex.COLOURS))]
    for index in range(int(rng.integers(9, 15))):
        shape = shapes[index] if index < 7 else str(rng.choice(shapes[: len(shapes) - 4]))
        colour = colours[index % 5] if index < 5 else str(rng.choice(colours[:6]))
        small = bool(rng.random() < 0.5)
        side = int(rng.integers(*(SMALL_OBJECT if small else LARGE_OBJECT)))
        plate = bool(rng.random() < 0.4)
        pen = _pen(rng, small)
        text = lex.forms("number", rng)
        width = max(side, pen.width(text[0])) if plate else side
        spot = _free_spot(rng, taken, width, side + (pen.height + 3 if plate else 0), size)
        if spot is None:
            continue
        box = canvas.object(spot[0], spot[1], side, shape, colour, rng)
        placed.append((shape, colour, box, small))
        if plate:
            text_box = canvas.text(spot[0], spot[1] + side + 2, text[0], pen)
            plates.append(QA("plate", "", text, (box,), (text_box,), small, f"{colour} {shape}"))
    qas = _presence(rng, placed) + _attributes(rng, placed, size) + _counts(rng, placed)
    names = [f"{colour} {shape}" for shape, colour, _, _ in placed]
    for plate_qa in plates:
        if names.count(plate_qa.subject) > 1:
            continue
        question, form = _ask(rng, "plate", plate_qa.answers, o=plate_qa.subject)
        qas.append(replace(plate_qa, question=question, form=form))
    return Scene(canvas.image, canvas.marks, qas, [p for p in plates if names.count(p.subject) > 1])


def _presence(rng: np.random.Generator, placed: list) -> list[QA]:
    """Is there a red star? The evidence, for yes and for no, is every object of that colour: the look-alikes."""
    qas = []
    for colour in {c: 0 for _, c, _, _ in placed}:
        alike = [p for p in placed if p[1] == colour]
        if len({p[3] for p in alike}) > 1:  # near and far look-alikes: not one size of evidence
            continue
        absent = [s for s in lex.SHAPES if all(p[0] != s for p in alike)]
        for present, shape in ((True, str(rng.choice([p[0] for p in alike]))), (False, str(rng.choice(absent)))):
            question, form = _ask(rng, "presence", ("yes",), o=f"{colour} {shape}")
            boxes = tuple(p[2] for p in alike)
            answer = ("yes",) if present else ("no",)
            qas.append(
                QA(
                    "presence",
                    question,
                    answer,
                    boxes,
                    boxes if present else (),
                    alike[0][3],
                    f"{colour} {shape}",
                    form,
                )
            )
    return qas


def _attributes(rng: np.random.Generator, placed: list, size: tuple[int, int]) -> list[QA]:
    qas = []
    for shape, colour, box, small in placed:
        if sum(p[0] == shape for p in placed) == 1:
            answers = lex.COLOUR_FORMS.get(colour, (colour,))
            question, form = _ask(rng, "colour", answers, s=shape)
            qas.append(QA("colour", question, answers, (box,), (box,), small, shape, form))
            place = lex.place((box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1])
            question, form = _ask(rng, "place", place, s=shape)
            qas.append(QA("place", question, place, (box,), (box,), small, shape, form))
    return qas


def _counts(rng: np.random.Generator, placed: list) -> list[QA]:
    """How many stars? Every instance is evidence, so it often spans a half or the whole picture."""
    qas = []
    for shape in {s: 0 for s, _, _, _ in placed}:
        same = [p for p in placed if p[0] == shape]
        if len(same) <= 4 and len({p[3] for p in same}) == 1:
            answers = (str(len(same)), lex.NUMBER_WORDS[len(same)])
            question, form = _ask(rng, "count", answers, s=shape)
            boxes = tuple(p[2] for p in same)
            qas.append(QA("count", question, answers, boxes, boxes, same[0][3], shape, form))
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
            every += [_shift_qa(q, dx, dy) for q in scene.qas if q.kind in ("field", "bar", "sign", "colour", "plate")]
            ambiguous += [_shift_qa(q, dx, dy) for q in scene.ambiguous]
    subjects = [q.subject for q in every]
    names = [m.text.rstrip(":") for m in marks]
    named = ("field", "bar", "colour")  # by a word that may stand in another picture too
    qas = [q for q in every if subjects.count(q.subject) == 1 and (q.kind not in named or names.count(q.subject) == 1)]
    return Scene(image, marks, qas, ambiguous + [q for q in every if q not in qas])


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


PAINTERS = {"page": page, "chart": chart, "signs": signs, "objects": objects, "collage": collage}
