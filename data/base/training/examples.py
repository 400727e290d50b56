"""Conversations of base training: a picture with up to ten questions, or text alone.

The model is asked only about legible evidence, so that illegible print lies outside its training distribution. It sees
single images, groups of images and calls of other functions, but never the crop tool.
"""

import json
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from awares.method import crops
from awares.method.crops import CROPS
from awares.mini import scenes
from awares.mini import vocabulary as lex
from awares.mini.drawing import SUITE, Style
from awares.mini.scenes import QA, Scene
from awares.settings import CROP_NAMES, CropSettings
from recipe import Stage
from targets import LEGIBLE, WORDS, Trail, View, evidence, trail, view

QUESTIONS = 10  # at most, in a conversation
TEXT_SHARE = 0.06  # of the conversations: without a picture
ARGUMENT_SHARE = 0.5  # of the questions of a conversation with calls: the answer is the argument of a call
LOCATED_SHARE = 0.85  # of those conversations: the argument is the part of the picture that holds the evidence
TIGHT_SHARE = 0.5  # of the questions behind a call: the part is a smallest one that holds the evidence
SMALL_SHARE = 0.6  # of the questions behind a call: about print too small for half resolution, if there is any
CROP_SETTINGS = CropSettings(offered=CROP_NAMES, region_budget=1.0, margin=0, rule="coverage", iou_threshold=0.5,
    coverage_threshold=0.95, max_side=2000, min_pixels=0, max_pixels=0, geometry="ours")  # fmt: skip
VERBS = "open search move play paint order find send book light crop mark save print see call".split()
ARGUMENTS = "regions places items names target colour city day count arguments".split()


@dataclass
class Example:
    views: list[View] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)  # question and answer
    system: str = lex.SYSTEMS[0]
    late: int = 0  # the turn at which all views but the first are shown
    trails: list[Trail] = field(default_factory=list)  # one a turn, or none
    call: str = ""  # a given call before the answer of that turn, whose result those views are
    candid: bool = False  # the system message wants illegible print admitted


class Function(NamedTuple):
    """A function that a system message offers, never the crop tool."""

    verb: str
    noun: str
    argument: str
    offered: list[str]  # what the argument may contain
    words: list[str]  # what it contains

    @classmethod
    def draw(cls, rng: Generator, of_places: bool = False) -> "Function":
        """A random function whose argument lists things or places, or places alone."""
        pool = [*lex.PLACES, "top", "bottom", "left", "right", "all"]
        pool += [] if of_places else [*lex.SHAPES, *lex.ITEMS, *lex.CITIES]
        offered = rng.choice(pool, int(rng.integers(3, 8)), replace=False).tolist()
        words = offered[: int(rng.integers(1, 4))]
        verb, argument = str(rng.choice(VERBS)), str(rng.choice(ARGUMENTS))
        return cls(verb, str(rng.choice(lex.ANIMALS)), argument, offered, words)

    def offer(self) -> str:
        return f"\n<tools>\n{self._json(self.offered)}\n</tools>"

    def call(self, words: list[str]) -> str:
        return f"<tool_call>\n{self._json(words)}\n</tool_call>"

    def _json(self, words: list[str]) -> str:
        return json.dumps({"name": f"{self.verb}_{self.noun}", "arguments": {self.argument: words}})


def example(rng: Generator, stage: Stage) -> Example:
    """One conversation about one picture: whole, halved, a part of it, or a halved view with parts of it."""
    if stage.asks and rng.random() < TEXT_SHARE:
        return text_example(rng)
    painter = _draw(rng, stage.painters)
    size = SUITE.sizes[int(rng.integers(len(SUITE.sizes)))]
    captured = stage.trains != "language"  # symbolic pages need no camera
    px = int(rng.integers(13, 49)) if stage.graded and rng.random() < stage.graded else 0
    style = Style.graded(px) if px else SUITE
    scene = scenes.paint(painter, rng, size, style) if captured else scenes.PAINTERS[painter](rng, size, style)
    if px >= 2 * LEGIBLE:  # at half resolution, too
        scene.qas = [replace(qa, small=False) for qa in scene.qas]
    kind = _draw(rng, stage.views)
    kind = "full" if painter == "ledger" and kind == "half" else kind  # its keys may be small
    parts, wanted = _parts(rng, scene, stage, kind)
    views = [view(scene, halve=kind != "full")] if kind != "part" else []
    views += [view(scene, CROPS[part]) for part in parts]
    if not stage.asks:
        return Example(views)
    order, candid = _questions(rng, scene, stage, kind, views)
    late = 0
    if kind == "group" and rng.random() < 0.5:  # the parts come after questions that the first view answers
        early = [qa for qa in order if not qa.small][:2]
        order, late = early + [qa for qa in order if qa not in early], len(early)
    system, call = _system(rng, candid), ""
    if wanted and rng.random() < stage.called:
        early = [qa for qa in order if not qa.small and qa is not wanted][: int(rng.integers(3))]
        others = [qa for qa in order if qa not in early and qa is not wanted]
        order, late = [*early, wanted, *others[:3]], len(early)
        function = Function.draw(rng, bool(rng.random() < 0.5))
        system += function.offer() if rng.random() < 0.7 else ""
        call = function.call(function.words)
    turns = [(qa.question, qa.answers[qa.form]) for qa in order]
    if stage.called and not call and not candid and rng.random() < stage.argument:
        order, turns, system = _as_arguments(rng, scene, order, views[0] if kind != "part" else None)
    whole = views[:1] if stage.called else views  # a part does not show a place in the whole
    trails = [trail(qa, scene, whole if qa.kind in ("place", "unread") else views) for qa in order]
    return Example(views, turns, system, late if late < len(order) else 0, trails, call, candid)


def text_example(rng: Generator) -> Example:
    """Text alone, with every token of a tool call and its answer: call an offered function, or repeat words."""
    function = Function.draw(rng)
    verb, words = function.verb, function.words
    others = rng.choice(lex.SYSTEMS[1:], int(rng.integers(0, 3)), replace=False)
    system = " ".join([lex.SYSTEMS[0], *others.tolist()])
    dice = rng.random()
    if dice < 0.7:
        function = function._replace(offered=rng.permutation(function.offered).tolist())
        result = " ".join(rng.choice(WORDS, int(rng.integers(1, 3))).tolist())
        if rng.random() < 0.15:
            result = f"error: no such {result}"
        turns = [(f"{verb} {' and '.join(words)}.", function.call(words))]
        turns += [(f"<tool_response>\n{result}\n</tool_response>", result)]
        return Example(turns=turns, system=system + function.offer())
    if dice < 0.85:
        return Example(turns=[(f"repeat as a list: {' and '.join(words)}", json.dumps(words))], system=system)
    text = f"{function.argument} {verb} {' '.join(words)}"
    return Example(turns=[(f"repeat: {text}", text)], system=system)


def _draw(rng: Generator, shares: dict[str, float]) -> str:
    return str(rng.choice(list(shares), p=list(shares.values())))


def _parts(rng: Generator, scene: Scene, stage: Stage, kind: str) -> tuple[list[str], QA | None]:
    """The parts to show, and the question behind a call that the first part answers."""
    if kind not in ("part", "group"):
        return [], None
    count = 2 if kind == "group" and rng.random() < 0.2 else 1
    parts = rng.choice([name for name in CROPS if name != "all"], count, replace=False).tolist()
    pool = [qa for qa in scene.qas if qa.kind != "place" and _fits(scene, "all", qa)]
    if kind == "part" or not stage.called or not pool:
        return parts, None
    small = [qa for qa in pool if qa.small]
    wanted = _balanced(rng, small if small and rng.random() < SMALL_SHARE else pool, stage.twice)[0]
    # a random part hardly ever holds both values of a pair
    fitting = [part for part in rng.permutation(list(CROPS)).tolist() if _fits(scene, part, wanted)]
    parts[0] = min(fitting, key=crops.area) if rng.random() < TIGHT_SHARE else fitting[0]
    return parts, wanted


def _fits(scene: Scene, part: str, qa: QA) -> bool:
    """Whether the evidence of a question lies in a part of a scene, with a tolerance of one pixel."""
    left, top, right, bottom = (edge * side for edge, side in zip(CROPS[part], 2 * scene.image.size, strict=True))
    boxes = evidence(qa)
    return all(b[0] >= left - 1 and b[1] >= top - 1 and b[2] <= right + 1 and b[3] <= bottom + 1 for b in boxes)


def _questions(rng: Generator, scene: Scene, stage: Stage, kind: str, views: list[View]) -> tuple[list[QA], bool]:
    """Questions that the views answer, and whether the system message wants illegible print admitted."""
    answered = [qa for qa in scene.qas if any(one.answers(qa) for one in views)]
    if kind == "part":  # it does not answer questions about the whole picture
        answered = [qa for qa in answered if qa.kind not in ("place", "count")]
    order = _balanced(rng, answered, stage.twice)[:QUESTIONS]
    candid = bool(stage.candid) and kind in ("full", "half") and rng.random() < stage.candid
    if candid and kind == "half":
        illegible = _balanced(rng, [qa for qa in scene.qas if qa.small])[: QUESTIONS // 2]
        unread = [_changed(qa, "unread", lex.UNREAD, qa.answer_boxes or qa.question_boxes) for qa in illegible]
        order = order[: QUESTIONS - len(unread)] + unread
        order = [order[i] for i in rng.permutation(len(order))]
    return order, candid


def _changed(qa: QA, kind: str, answer: str, boxes: tuple[scenes.PixelBox, ...]) -> QA:
    """The same question with another answer."""
    return replace(qa, kind=kind, answers=(answer,), answer_boxes=boxes, form=0, small=False)


def _balanced(rng: Generator, qas: list[QA], twice: tuple[str, ...] = ()) -> list[QA]:
    """At most 12 questions, one of each kind in turn (two of the kinds in ``twice``), then shuffled."""
    by_kind: dict[str, list[QA]] = {}
    for index in rng.permutation(len(qas)):
        by_kind.setdefault(qas[index].kind, []).insert(0, qas[index])
    picked: list[QA] = []
    while any(by_kind.values()):
        for kind, left in by_kind.items():
            count = 2 if kind in twice else 1
            picked += left[:count]
            del left[:count]
    return [picked[i] for i in rng.permutation(min(len(picked), 12))] if picked else []


def _system(rng: Generator, candid: bool) -> str:
    dice = rng.random()
    system = text_example(rng).system if dice < 0.12 else str(rng.choice(lex.SYSTEMS)) if dice < 0.3 else lex.SYSTEMS[0]
    if not candid:
        return system
    function = Function.draw(rng)
    return str(rng.choice(lex.CANDID)) + (function.offer() if rng.random() < 0.5 else "")


def _as_arguments(
    rng: Generator, scene: Scene, order: list[QA], whole: View | None
) -> tuple[list[QA], list[tuple[str, str]], str]:
    """Questions, turns and system message of a conversation where some answers are the argument of a call."""
    function = Function.draw(rng)
    calls = [bool(rng.random() < ARGUMENT_SHARE) for _ in order]
    if whole and rng.random() < LOCATED_SHARE:
        function = function._replace(offered=rng.permutation(list(CROPS)).tolist())
        located = []  # questions that are answered by the part that holds the evidence, legible or not
        for qa in _balanced(rng, [qa for qa in scene.qas if qa.kind != "place" and qa.answer_boxes]):
            boxes = tuple(dict.fromkeys(evidence(qa)))
            if all(whole.contains(box) for box in boxes):
                edges = np.divide(crops.box_union(boxes), 2 * scene.image.size).clip(0, 1)  # may exceed it by 1 px
                part = crops.coverage_rule([[round(1000 * edge) for edge in edges.tolist()]], CROP_SETTINGS)[0]
                located.append(_changed(qa, "place", part, boxes))
        calls = [call and index < len(located) for index, call in enumerate(calls)]
        order = [one if call else qa for qa, one, call in zip(order, located + order, calls, strict=False)]
    turns = [(qa.question, qa.answers[qa.form]) for qa in order]
    for index, (question, answer) in enumerate(turns):
        if calls[index]:
            turns[index] = f"{function.verb} {question}", function.call([answer])
    return order, turns, lex.SYSTEMS[0] + function.offer()
