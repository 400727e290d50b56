"""The closed vocabulary of the synthetic rows: what is printed, drawn, asked and answered; small, for a tiny model.

sentences.yaml has the phrasings of questions and the system messages.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from awares.engine.answer_match import ONES, TENS

NAMES = "anna ben clara david emma hugo iris leo maya noah paul rosa".split()
CITIES = "oslo paris rome lima cairo delhi tokyo madrid boston vienna".split()
ITEMS = "bread milk soup rice apple pear fish tea coffee honey cake lemon".split()
FIELDS = "total order date desk room gate seat price rate score level unit".split()
DAYS = "monday friday sunday march april june july winter".split()
ANIMALS = "cat dog horse sheep goat duck eagle tiger whale snake".split()
SHOP = "sale open fresh hotel museum school garden market studio station".split()

COLOURS = {
    "red": (205, 35, 35), "blue": (40, 70, 205), "green": (30, 140, 50), "yellow": (235, 210, 30),
    "orange": (240, 130, 20), "purple": (130, 40, 160), "pink": (240, 130, 180), "black": (25, 25, 25),
    "brown": (120, 70, 30),
}  # fmt: skip


def _box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


_TIPS = [(0.5 if i % 2 == 0 else 0.2, math.pi * (i / 5 - 0.5)) for i in range(10)]  # of a star: radius, angle
_STAR = [(0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)) for radius, angle in _TIPS]
_FULL, _GONE = 255, 0
# name -> layers of (polygon, or two corners of an ellipse; in the unit square) with a mask value
SHAPES: dict[str, list[tuple[list[tuple[float, float]], int]]] = {
    "circle": [([(0, 0), (1, 1)], _FULL)],
    "square": [(_box(0.04, 0.04, 0.96, 0.96), _FULL)],
    "triangle": [([(0.5, 0), (1, 1), (0, 1)], _FULL)],
    "star": [(_STAR, _FULL)],
    "cross": [(_box(0.34, 0, 0.66, 1), _FULL), (_box(0, 0.34, 1, 0.66), _FULL)],
    "diamond": [([(0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)], _FULL)],
    "ring": [([(0, 0), (1, 1)], _FULL), ([(0.26, 0.26), (0.74, 0.74)], _GONE)],
    "arrow": [([(0, 0.32), (0.5, 0.32), (0.5, 0), (1, 0.5), (0.5, 1), (0.5, 0.68), (0, 0.68)], _FULL)],
    "moon": [([(0, 0), (1, 1)], _FULL), ([(0.38, -0.05), (1.28, 0.85)], _GONE)],
    "heart": [([(0, 0.04), (0.54, 0.58)], _FULL), ([(0.46, 0.04), (1, 0.58)], _FULL),
              ([(0.03, 0.42), (0.97, 0.42), (0.5, 1)], _FULL)],
    "house": [([(0.5, 0), (1, 0.45), (0, 0.45)], _FULL), (_box(0.14, 0.45, 0.86, 1), _FULL),
              (_box(0.4, 0.62, 0.6, 1), _GONE)],
    "flag": [(_box(0.08, 0, 0.24, 1), _FULL), ([(0.24, 0.04), (1, 0.3), (0.24, 0.58)], _FULL)],
    "tree": [([(0.5, 0), (0.95, 0.7), (0.05, 0.7)], _FULL), (_box(0.4, 0.7, 0.6, 1), _FULL)],
    "table": [(_box(0, 0.1, 1, 0.36), _FULL), (_box(0.06, 0.36, 0.26, 1), _FULL), (_box(0.74, 0.36, 0.94, 1), _FULL)],
}  # fmt: skip

NUMBER_WORDS = ONES + [ten if one == "zero" else f"{ten}-{one}" for ten in TENS for one in ONES[:10]]

# keys by theme; no word is both a key and a value, so that a key names one place of a page
THEMES = {"field": FIELDS, "name": NAMES, "city": CITIES, "item": ITEMS, "day": DAYS, "animal": ANIMALS}
WORD_VALUES = {
    "person": "adam bella carl diana erik helen ivan laura".split(),
    "town": "athens bern lisbon quito riga seoul tunis accra".split(),
}
THEME_VALUES = {
    "field": ("number", "money", "percent", "person", "town"), "name": ("number", "town", "money"),
    "city": ("number", "percent", "person"), "item": ("money", "weight", "percent"),
    "day": ("number", "person", "town"), "animal": ("number", "weight", "town"),
}  # fmt: skip
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right", "center")
_PLACE_FORMS = dict(zip(PLACES, ("upper left", "upper right", "lower left", "lower right", "middle"), strict=True))

UNREAD = "unclear"  # the answer to print that is too small to read (base training only)
_SENTENCES = yaml.safe_load(Path(__file__).with_name("sentences.yaml").read_text(encoding="utf-8"))
PHRASINGS, UNSEEN_PHRASINGS = (
    {kind: text.splitlines() for kind, text in _SENTENCES[name].items()} for name in ("phrasings", "unseen_phrasings")
)
SYSTEMS, CANDID = (_SENTENCES[name].splitlines() for name in ("systems", "candid"))


def forms(kind: str, rng: np.random.Generator) -> tuple[str, ...]:
    """A random value of ``kind`` with its surface forms, the printed one first."""
    if kind in WORD_VALUES:
        return (str(rng.choice(WORD_VALUES[kind])),)
    n = int(rng.integers(2, 100))
    return {
        "number": (str(n), NUMBER_WORDS[n]),
        "percent": (f"{n}%", f"{n} percent", str(n)),
        "money": (f"${n}", f"{n} dollars", str(n)),
        "weight": (f"{n} kg", f"{n} kilos", str(n)),
    }[kind]


def sign(rng: np.random.Generator) -> tuple[str, ...]:
    """The text of a sign: a word, two words, or a word and a number."""
    word = str(rng.choice(SHOP + ANIMALS + ITEMS))
    style = rng.random()
    if style < 0.45:
        return (word,)
    if style < 0.75:
        n = int(rng.integers(2, 100))
        return f"{word} {n}", f"{word} {NUMBER_WORDS[n]}"
    return (f"{word} {rng.choice(SHOP)}",)


def place(x: float, y: float) -> tuple[str, str]:
    """Name and second form of the part of the unit square that holds a point: the centre or a quadrant."""
    quadrant = f"{'top' if y < 0.5 else 'bottom'}-{'left' if x < 0.5 else 'right'}"
    name = "center" if 0.3 <= x <= 0.7 and 0.3 <= y <= 0.7 else quadrant
    return name, _PLACE_FORMS[name]


def shuffled_keys(rng: np.random.Generator) -> dict[str, list[str]]:
    """The keys of a page by theme, in random order."""
    return {theme: rng.permutation(words).tolist() for theme, words in THEMES.items()}


def take(keys: list[str], fits: Callable[[str], bool]) -> str | None:
    """Remove and return the first of ``keys`` that fits, so that a key names one entry; None if none fits."""
    key = next(filter(fits, keys), None)
    if key is not None:
        keys.remove(key)
    return key
