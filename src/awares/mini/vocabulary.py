"""The closed vocabulary of the synthetic rows: what is printed, drawn, asked and answered; small, for a tiny model."""

import math
from collections.abc import Callable

import numpy as np

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

PHRASINGS = {
    "field": ["what is the {k}?", "which value stands next to {k}?", "read the entry for {k}.",
        "what is given for {k}?", "look up {k}.", "what does the page say about {k}?", "{k}?",
        "find {k} and tell its value.", "tell me the value of {k} in words or short form.",
        "say what is listed for {k}.", "how would you say the entry of {k}?", "please tell me what {k} is."],
    "pair": ["what are the values of {a} and {b}?", "read the entries for {a} and {b}.", "{a} and {b}?",
        "look up {a} and {b}.", "what is given for {a} and for {b}?", "find both {a} and {b}.",
        "say what is listed for {a} and {b}.", "please tell me {a} and {b}.",
        "how would you say the entries of {a} and {b}?"],
    "bar": ["what is the value of {k}?", "how high is the bar of {k}?", "what does the bar of {k} show?",
        "read the bar of {k}.", "{k}?", "which number belongs to {k}?", "how much is {k}?", "give the value of {k}.",
        "say how much {k} has.", "how would you say the value of {k}?", "please tell me how much {k} is.",
        "tell me what {k} reaches."],
    "bars": ["what are the values of {a} and {b}?", "read the bars of {a} and {b}.", "{a} and {b}?",
        "how much are {a} and {b}?", "what do the bars of {a} and {b} show?", "give both {a} and {b}.",
        "say how much {a} and {b} have.", "please tell me {a} and {b}.",
        "how would you say the values of {a} and {b}?"],
    "sign": ["what is written on the {c} sign?", "what does the {c} sign say?", "read the {c} sign.",
        "which text is on the {c} board?", "what stands on the {c} sign?", "the {c} sign reads?",
        "give the text of the {c} board.", "what can be read on the {c} board?",
        "how would you say what is on the {c} sign?", "please tell me what the {c} sign says.",
        "say what the {c} board shows.", "tell me the text on the {c} sign."],
    "presence": ["is there a {o}?", "is there a {o} in the picture?", "do you see a {o}?",
        "does the picture show a {o}?", "can you find a {o} here?", "is a {o} present?", "a {o}, is it there?",
        "does a {o} appear in the image?", "is any {o} visible?"],
    "badge": ["which shape is on the badge of the {o}?", "what is on the badge of the {o}?",
        "what does the badge of the {o} show?", "the {o} carries which badge?", "read the badge of the {o}.",
        "which badge does the {o} have?", "name the badge of the {o}.", "badge of the {o}?",
        "please tell me what the badge of the {o} shows.", "say which badge is below the {o}."],
    "place": ["where is {s}?", "in which part of the picture is {s}?", "where do you see {s}?", "which part holds {s}?",
        "where does {s} stand?", "locate {s}.", "say where {s} is.", "please tell me where {s} is.",
        "tell me the place of {s}."],
    "count": ["how many {o} shapes are there?", "count the {o} shapes.", "what is the number of {o} shapes?",
        "how many times does a {o} appear?", "how often do you see a {o}?", "give the count of {o} shapes.",
        "say how many {o} shapes you see.", "please tell me how many {o} shapes there are.",
        "tell me the number of {o} shapes in words."],
    "plate": ["which number is below the {o}?", "what number does the {o} carry?", "read the number under the {o}.",
        "what is the number of the {o}?", "number of the {o}?", "the {o} has which number?",
        "say the number of the {o}.", "please tell me the number below the {o}.",
        "tell me in words the number of the {o}."],
}  # fmt: skip

# of the shifted rows: sentences that the base model has not seen, of words that it has
UNSEEN_PHRASINGS = {
    "field": ["please read what stands next to {k}.", "which entry does the page give for {k}?",
        "tell me in words what is listed for {k}."],
    "pair": ["please read what is listed for {a} and {b}.", "which entries does the page give for {a} and {b}?",
        "tell me in words the entries of {a} and {b}."],
    "bar": ["please read how high {k} is.", "which value does the bar of {k} show?",
        "tell me in words the value of {k}."],
    "bars": ["please read how high {a} and {b} are.", "which values do the bars of {a} and {b} show?",
        "tell me in words the values of {a} and {b}."],
    "sign": ["please read what stands on the {c} board.", "which text does the {c} sign show?",
        "tell me in words what the {c} board says."],
    "presence": ["please say, is there any {o}?", "can you see a {o} in the image?", "is a {o} visible here?"],
    "badge": ["please read the badge which the {o} carries.", "which shape does the badge of the {o} show?",
        "tell me the badge of the {o}."],
    "place": ["please say in which part {s} is.", "can you locate {s}?", "tell me where you see {s}."],
    "count": ["please say how many {o} shapes appear.", "which number of {o} shapes do you see?",
        "tell me in words how many {o} shapes there are."],
    "plate": ["please read which number the {o} carries.", "what is the number the {o} has?",
        "tell me in words which number the {o} carries."],
}  # fmt: skip

# base training only; separate from PHRASINGS, whose text trains the tokenizer
UNREAD = "unclear"
CANDID = [f"Where something is too small to read, say {UNREAD}.", f"Say {UNREAD} if you cannot read it.",
          f"If it is too small, the answer is {UNREAD}."]  # fmt: skip

# the first system message is the plain one; the others expose the base model to instructions and their words
SYSTEMS = [
    "You are a helpful assistant.", "Answer the question.", "Answer in a few words.",
    "The image is shown at full resolution.", "The image is shown at half resolution.",
    "Look at the image and answer the question.", "Answer the question, or call the tool.",
    "The tool can see more.", "Call the tool to see the result.", "See the regions of the image.",
    "There is no such region in the image.", "There was an error.",
]  # fmt: skip


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
