"""Scenes of the synthetic rows: pages, charts, signs, objects and collages, with every question they can answer.

A question names something large (a key, a coloured sign, a carrier, a colour); its answer is small or large. So half
resolution shows where to look, but often not the answer. The question is drawn independently of the size of the answer
and cannot reveal whether a crop is needed.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from awares.mini import vocabulary as lex
from awares.mini.drawing import SUITE, Canvas, Mark, Pen, PixelBox, Size, Style, capture, free_spot, text_lines, tint


@dataclass(frozen=True)
class QA:
    """A question about a scene. `answers[0]` is the printed form, the others are accepted; boxes are in px."""

    kind: str
    question: str
    answers: tuple[str, ...]
    question_boxes: tuple[PixelBox, ...]
    answer_boxes: tuple[PixelBox, ...]
    small: bool
    subject: str = ""
    form: int = 0  # the answer that this phrasing asks for (base training only)


@dataclass
class Scene:
    """A picture, all that is printed on it, and its questions."""

    image: Image.Image
    marks: list[Mark] = field(default_factory=list)
    qas: list[QA] = field(default_factory=list)
    ambiguous: list[QA] = field(default_factory=list)  # not used: the subject occurs twice

    def moved(self, dx: int, dy: int) -> "Scene":
        """The scene as a part of a larger picture, with its top left corner at (dx, dy)."""

        def move(boxes: tuple[PixelBox, ...]) -> tuple[PixelBox, ...]:
            return tuple((left + dx, top + dy, right + dx, bottom + dy) for left, top, right, bottom in boxes)

        def move_qa(qa: QA) -> QA:
            return replace(qa, question_boxes=move(qa.question_boxes), answer_boxes=move(qa.answer_boxes))

        chars = [tuple((char, x + dx) for char, x in mark.chars) for mark in self.marks]
        marks = [replace(mark, box=move((mark.box,))[0], chars=c) for mark, c in zip(self.marks, chars, strict=True)]
        return Scene(self.image, marks, list(map(move_qa, self.qas)), list(map(move_qa, self.ambiguous)))


class Entry(NamedTuple):
    """A key (always large) and its value on a page or chart, which is `small` or large."""

    key: str
    key_box: PixelBox
    value: tuple[str, ...]
    value_box: PixelBox
    small: bool


def paint(name: str, rng: Generator, size: Size, style: Style = SUITE) -> Scene:
    """Scene `name` of PAINTERS on `size` px, as captured by a camera or scanner."""
    scene = PAINTERS[name](rng, size, style)
    scene.image = Image.open(io.BytesIO(capture(scene.image, rng))).convert("RGB")
    return scene


def page(rng: Generator, size: Size, style: Style = SUITE) -> Scene:
    """A filled form, price list or roster: lines of `key: value` entries, values large or small (mirrors DocVQA)."""
    canvas = Canvas(style, size, rng, (242, 240, 232), 10, 2.0)
    entries: list[Entry] = []
    keys = lex.shuffled_keys(rng)
    theme, y = str(rng.choice(list(keys))), float(rng.integers(3, 12))
    key_pen = style.pen(rng, False)
    while y + key_pen.height + 2 <= size[1]:
        x = float(rng.integers(4, 14))
        while entry := _field(canvas, keys[theme], lex.THEME_VALUES[theme], x, y, key_pen, rng):
            entries.append(entry)
            x = entry.value_box[2] + float(rng.integers(10, 26))
        y += key_pen.height + int(rng.integers(3, 8))
        if rng.random() < 0.3:
            theme, key_pen = str(rng.choice(list(keys))), style.pen(rng, False)
    return _ask_entries(rng, canvas, entries, ("field", "pair"))


def _field(
    canvas: Canvas, keys: list[str], kinds: Sequence[str], x: float, y: float, key_pen: Pen, rng: Generator
) -> Entry | None:
    """One entry on a line, its value (of one of ``kinds``) within the key's height; None if none of ``keys`` fits."""
    pen = canvas.style.pen(rng, bool(rng.random() < 0.55))
    value = lex.forms(kinds[0] if len(kinds) == 1 else str(rng.choice(kinds)), rng)
    value_x = x + pen.size * rng.uniform(0.5, 1.0)
    key = lex.take(keys, lambda key: value_x + key_pen.width(f"{key}:") + pen.width(value[0]) + 4 <= canvas.width)
    if key is None:
        return None
    key_box = canvas.text(x, y, key + ":", key_pen)
    value_y = y + rng.uniform(0, max(0, key_pen.height - pen.height))
    edge = canvas.width - pen.width(value[0]) - 4
    value_x = edge if canvas.style.rearranged else value_x + key_pen.width(key + ":")
    value_box = canvas.text(value_x, value_y, value[0], pen)
    return Entry(key, key_box, value, value_box, pen.small)


def _ask_entries(rng: Generator, canvas: Canvas, entries: list[Entry], kinds: tuple[str, str]) -> Scene:
    """Questions about each entry (``kinds[0]``), about pairs, often far apart (``kinds[1]``), and places of values."""
    qas = []
    for key, key_box, value, value_box, small in entries:
        qas.append(_ask(rng, canvas, QA(kinds[0], "", value, (key_box,), (value_box,), small, key), k=key))
        qas.append(_where(rng, key, key, key_box, value_box, canvas))
    for small in (False, True):
        alike = [entry for entry in entries if entry.small == small]
        for _ in range(3 if len(alike) > 1 else 0):
            a, b = (alike[i] for i in rng.choice(len(alike), 2, replace=False))
            answers = f"{a.value[0]} and {b.value[0]}", f"{a.value[:2][-1]} and {b.value[:2][-1]}"
            boxes = (a.key_box, b.key_box), (a.value_box, b.value_box)
            pair = QA(kinds[1], "", answers, *boxes, small, f"{a.key}+{b.key}")
            qas.append(_ask(rng, canvas, pair, a=a.key, b=b.key))
    return Scene(canvas.image, canvas.marks, qas)


def _ask(rng: Generator, canvas: Canvas, qa: QA, **slots: str) -> QA:
    """``qa`` in a random phrasing; the last third of the phrasings asks for the answer's second surface form."""
    phrasings = canvas.style.phrasings[qa.kind]
    index = int(rng.integers(len(phrasings)))
    form = min(len(qa.answers) - 1, 1) if index >= len(phrasings) * 2 // 3 else 0
    return replace(qa, question=phrasings[index].format(**slots), form=form)


def _where(rng: Generator, subject: str, shown: str, named: PixelBox, found: PixelBox, canvas: Canvas) -> QA:
    """A question about the place of something; half resolution shows the place (base training only)."""
    place = lex.place((found[0] + found[2]) / 2 / canvas.width, (found[1] + found[3]) / 2 / canvas.height)
    return _ask(rng, canvas, QA("place", "", place, (named,), (found,), False, subject), s=shown)


def chart(rng: Generator, size: Size, style: Style = SUITE) -> Scene:
    """Horizontal or vertical bars, each with its category and its value (mirrors ChartQA)."""
    canvas = Canvas(style, size, rng, (250, 250, 250), 5, 1.0)
    keys = lex.shuffled_keys(rng)
    theme = str(rng.choice(list(keys)))
    unit = str(rng.choice(["number", "percent", "money"]))
    bars = _horizontal_bars if rng.random() < 0.6 else _vertical_bars
    return _ask_entries(rng, canvas, bars(canvas, keys[theme], unit, rng), ("bar", "bars"))


def _horizontal_bars(canvas: Canvas, keys: list[str], unit: str, rng: Generator) -> list[Entry]:
    """Each line: the category, its value, its bar."""
    entries, y = [], float(rng.integers(4, 12))
    colour = tint(lex.COLOURS[str(rng.choice(list(lex.COLOURS)))], rng, 20)
    key_pen = canvas.style.pen(rng, False)
    height = key_pen.height + int(rng.integers(3, 7))
    while y + height <= canvas.height - 2 and (entry := _field(canvas, keys, [unit], 4, y + 2, key_pen, rng)):
        left, right = entry.value_box[2] + 8, canvas.width - 6.0
        if canvas.style.rearranged:
            left, right = entry.key_box[2] + 8, entry.value_box[0] - 8
        length = max(3.0, (right - left) * int(entry.value[0].strip("$%")) / 100)
        canvas.draw.rectangle((left, y + 1, left + length, y + height - 2), fill=colour)
        entries.append(entry)
        y += height + int(rng.integers(1, 6))
    return entries


def _vertical_bars(canvas: Canvas, keys: list[str], unit: str, rng: Generator) -> list[Entry]:
    """Under each bar its category, and below that its value."""
    entries: list[Entry] = []
    x = float(rng.integers(4, 10))
    colour = tint(lex.COLOURS[str(rng.choice(list(lex.COLOURS)))], rng, 20)
    style = canvas.style
    floor = canvas.height - max(int(rng.integers(78, 92)), 2 * style.large_text[1] + 4)
    key_pen = style.pen(rng, False)
    while True:
        pen, value = style.pen(rng, bool(rng.random() < 0.55)), lex.forms(unit, rng)
        least, room = pen.width(value[0]), canvas.width - 2 - x - 4
        key = lex.take(keys, lambda word: max(key_pen.width(word), least) <= room)  # noqa: B023 (called at once)
        if key is None:
            return entries
        width = max(key_pen.width(key), least) + 4
        above = style.large_text[1] + 6 if style.rearranged else 20
        height = max(3.0, (floor - above) * int(value[0].strip("$%")) / 100)
        canvas.draw.rectangle((x + 2, floor - height, x + width - 6, floor), fill=colour)
        key_box = canvas.text(x, floor + 4, key, key_pen)
        value_y = floor + 4 + key_pen.height + int(rng.integers(2, 5))
        value_box = canvas.text(x, floor - height - pen.height - 3 if style.rearranged else value_y, value[0], pen)
        entries.append(Entry(key, key_box, value, value_box, pen.small))
        x += width + int(rng.integers(3, 10))


def signs(rng: Generator, size: Size, style: Style = SUITE) -> Scene:
    """Coloured signs with words and numbers in front of a textured wall (mirrors TextVQA and OCRBench)."""
    canvas = Canvas(style, size, rng, (135, 135, 130), 35, 10.0)
    taken: list[PixelBox] = []
    qas = []
    for colour in rng.permutation(list(lex.COLOURS)).tolist():
        small = bool(rng.random() < 0.5)
        panel = tint(lex.COLOURS[colour], rng, 12)
        pen = style.pen(rng, small, dark=style.rearranged or sum(panel) > 380)
        text = lex.sign(rng)
        line = pen.width(text[0])
        width, height = line + int(rng.integers(8, 60)), float(pen.height + int(rng.integers(8, 50)))
        frame = 8 if style.rearranged else 0
        width, height = width + 2 * frame, height + 2 * frame
        if (spot := free_spot(rng, taken, width, height, size)) is None:
            continue
        x, y = spot
        canvas.draw.rounded_rectangle((x, y, x + width, y + height), radius=int(rng.integers(0, 7)), fill=panel)
        if frame:
            inside = x + frame, y + frame, x + width - frame, y + height - frame
            canvas.draw.rectangle(inside, fill=tint((245, 245, 240), rng, 10))
        text_x = x + rng.uniform(frame + 3, width - line - frame - 3)
        text_y = y + rng.uniform(frame + 3, height - pen.height - frame - 3)
        box = canvas.text(text_x, text_y, text[0], pen)
        board = (x, y, x + width, y + height)
        canvas.marks.append(Mark("sign", board, min(width, height), colour))
        qas.append(_ask(rng, canvas, QA("sign", "", text, (board,), (box,), small, colour), c=colour))
        qas.append(_where(rng, colour, f"the {colour} sign", board, box, canvas))
    return Scene(canvas.image, canvas.marks, qas)


def objects(rng: Generator, size: Size, style: Style = SUITE) -> Scene:
    """Objects, each colour near (large, some with a plate or badge) or far (mirrors POPE, RealWorldQA, V*Bench)."""
    canvas = Canvas(style, size, rng, (205, 205, 195), 30, 9.0)
    taken: list[PixelBox] = []
    placed: list[Mark] = []
    carried: list[tuple[Mark, str, tuple[str, ...], PixelBox, bool]] = []
    colours = [str(c) for c in rng.permutation(list(lex.COLOURS))[: int(rng.integers(4, 7))]]
    far = {colour: bool(rng.random() < 0.45) for colour in colours}
    shapes = {colour: rng.choice(list(lex.SHAPES), 3, replace=False).tolist() for colour in colours}
    for _ in range(int(rng.integers(9, 15))):
        colour = str(rng.choice(colours))
        side = style.side(rng, far[colour])
        load = "" if far[colour] else str(rng.choice(["plate", "badge", ""], p=[0.35, 0.35, 0.3]))
        small = bool(rng.random() < 0.5)
        pen, number = style.pen(rng, small), lex.forms("number", rng)
        badge = style.side(rng, small)
        width = max(side, {"plate": pen.width(number[0]), "badge": badge + 6, "": 0}[load])
        height = side + {"plate": pen.height + 3, "badge": badge + 8, "": 0}[load]
        if style.rearranged and load:
            width, height = side + 3 + width, max(side, height - side)
        if (spot := free_spot(rng, taken, width, height, size)) is None:
            continue
        x, y = spot
        placed.append(canvas.object(x, y, side, str(rng.choice(shapes[colour])), colour, rng))
        x, y = (x + side + 3, y) if style.rearranged else (x, y + side + 2)  # of its load
        if load == "plate":
            carried.append((placed[-1], load, number, canvas.text(x, y, number[0], pen), small))
        elif load == "badge":
            ground = (x, y, x + badge + 5, y + badge + 5)
            canvas.draw.rounded_rectangle(ground, 3, fill=tint((70, 70, 80), rng, 15))
            mark = canvas.object(x + 3, y + 3, badge, str(rng.choice(list(lex.SHAPES))), "", rng)
            carried.append((placed[-1], load, (mark.text,), mark.box, small))
    names = [f"{mark.colour} {mark.text}" for mark in placed]
    scene = Scene(canvas.image, canvas.marks, _groups(rng, canvas, placed, far))
    for carrier, kind, answers, box, small in carried:
        subject = f"{carrier.colour} {carrier.text}"
        qa = _ask(rng, canvas, QA(kind, "", answers, (carrier.box,), (box,), small, subject), o=subject)
        (scene.qas if names.count(subject) == 1 else scene.ambiguous).append(qa)
    for mark, name in zip(placed, names, strict=True):
        if names.count(name) == 1 and not far[mark.colour]:
            scene.qas.append(_where(rng, name, f"the {name}", mark.box, mark.box, canvas))
    return scene


def _groups(rng: Generator, canvas: Canvas, placed: list[Mark], far: dict[str, bool]) -> list[QA]:
    """Is there a red star, and how many? The evidence is every object of that colour, often a half or the whole."""
    qas = []
    for colour in dict.fromkeys(mark.colour for mark in placed):
        alike = [mark for mark in placed if mark.colour == colour]
        boxes = tuple(mark.box for mark in alike)
        present = str(rng.choice([mark.text for mark in alike]))
        absent = str(rng.choice([shape for shape in lex.SHAPES if all(mark.text != shape for mark in alike)]))
        for shape, answer, found in ((present, "yes", boxes), (absent, "no", ())):
            name = f"{colour} {shape}"
            qas.append(_ask(rng, canvas, QA("presence", "", (answer,), boxes, found, far[colour], name), o=name))
        for shape in dict.fromkeys(mark.text for mark in alike):
            name, count = f"{colour} {shape}", sum(mark.text == shape for mark in alike)
            answers = (str(count), lex.NUMBER_WORDS[count])
            qas.append(_ask(rng, canvas, QA("count", "", answers, boxes, boxes, far[colour], name), o=name))
    return qas


def collage(rng: Generator, size: Size, style: Style = SUITE) -> Scene:
    """Two or four pictures in one (mirrors LLaVA-Multi); a question names what only one of them shows."""
    columns, rows = (2, 2) if min(size) >= 280 and rng.random() < 0.3 else ((2, 1) if size[0] >= size[1] else (1, 2))
    inner = (size[0] // columns - 2, size[1] // rows - 2)
    whole = Scene(Image.new("RGB", size, (128, 128, 128)))
    found: list[QA] = []
    for row, column in np.ndindex(rows, columns):
        corner = column * size[0] // columns + 1, row * size[1] // rows + 1
        part = PAINTERS[str(rng.choice(["page", "chart", "signs", "objects"]))](rng, inner, style).moved(*corner)
        whole.image.paste(part.image, corner)
        whole.marks += part.marks
        whole.ambiguous += part.ambiguous
        found += [qa for qa in part.qas if qa.kind in ("field", "bar", "sign", "badge", "plate")]
    subjects = Counter(qa.subject for qa in found)
    words = Counter(mark.text.rstrip(":") for mark in whole.marks)
    for qa in found:
        printed = words[qa.subject] if qa.kind in ("field", "bar") else 1  # another picture may show the same word
        (whole.qas if subjects[qa.subject] == printed == 1 else whole.ambiguous).append(qa)
    return whole


# Pages of base training


def wall(rng: Generator, size: Size, style: Style = SUITE) -> Scene:
    """Lines of words without questions, from which the vision tower learns to read (base training only)."""
    canvas = Canvas(style, size, rng, (242, 240, 232), 10, 2.0)
    for x, y, pen in text_lines(canvas, rng):
        while x + pen.width(word := _word_or_number(rng)) + 1 <= size[0]:
            x = canvas.text(x, y, word, pen)[2] + float(rng.uniform(3, 8)) * pen.size / 14
    return Scene(canvas.image, canvas.marks)


def ledger(rng: Generator, size: Size, style: Style = SUITE) -> Scene:
    """Lines of `key: value`, which teach the base model which value belongs to a key (base training only)."""
    canvas = Canvas(style, size, rng, (242, 240, 232), 10, 2.0)
    keys = [word for theme in lex.THEMES.values() for word in theme]
    qas = []
    for x, y, pen in text_lines(canvas, rng):
        small_pen = pen.shrunk(rng, style)
        other = small_pen if rng.random() < 0.5 else pen
        while True:
            key = keys[int(rng.integers(len(keys)))]
            value = " ".join(_word_or_number(rng).rstrip(":") for _ in range(int(rng.integers(1, 3))))
            gap = pen.size * rng.uniform(0.3, 1.0)
            if x + pen.width(f"{key}:") + gap + other.width(value) + 8 > size[0]:
                break
            named = canvas.text(x, y, f"{key}:", pen)
            lower = rng.uniform(0, max(0, pen.height - other.height))
            found = canvas.text(named[2] + gap, y + lower, value, other)
            qas.append(QA("field", "", (value,), (named,), (found,), other.small, key))
            x = found[2] + float(rng.uniform(6, 20))
    return Scene(canvas.image, canvas.marks, ambiguous=qas)


_PRINTED = [*chain(*lex.THEMES.values(), *lex.WORD_VALUES.values(), lex.SHOP, lex.SHAPES, ["kg"])]


def _word_or_number(rng: Generator) -> str:
    dice = rng.random()
    if rng.random() < 0.25:
        number = str(rng.integers(100))
        return f"{number}:" if dice < 0.15 else f"{number}%" if dice < 0.3 else f"${number}" if dice < 0.45 else number
    word = _PRINTED[int(rng.integers(len(_PRINTED)))]
    return f"{word}:" if dice < 0.15 else word


PAINTERS = {painter.__name__: painter for painter in (page, chart, signs, objects, collage, wall, ledger)}
