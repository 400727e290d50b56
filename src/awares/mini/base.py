"""The embedded base VLM: a small Qwen2.5-VL, trained from scratch on pages it can read.

Here are its architecture, its tokenizer and its examples; `lookup` and `pretrain` train it. A picture comes with dense targets (what stands on each
14 px patch, and whose value it is), up to ten questions in one conversation, and the trail of each answer (where a reader would look).

The base learns as a real one does, from *legible* evidence: at half resolution it is asked only about what has survived halving, so that
illegible text lies outside what it knows. It sees single images, image groups, and calls of other functions, some of which take what stands
in the picture or where it stands; it never sees the crop tool.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

from awares.config import CROP_NAMES, Crops
from awares.method import crops
from awares.method.crops import CROPS
from awares.mini import scenes
from awares.mini import vocabulary as lex

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
            "<|video_pad|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]  # fmt: skip
LEGIBLE_TEXT, LEGIBLE_OBJECT, LEGIBLE_COLOUR = 12.5, 12.5, 6.0  # px
PAPER_CROPS = Crops(
    offered=CROP_NAMES,  # type: ignore[arg-type]
    region_budget=1.0,
    rule="coverage",
    iou_threshold=0.5,
    coverage_threshold=0.95,
    max_side=2000,
)
PATCH, TOKEN = 14, 28  # px
CHARS = "abcdefghijklmnopqrstuvwxyz0123456789$%:"
WORDS = sorted({w for words in [*lex.THEMES.values(), *lex.WORD_VALUES.values(), lex.SHOP, list(lex.SHAPES)] for w in words}
               | {str(n) for n in range(100)} | {"kg", "sign"})  # fmt: skip
WORD_ID = {w: i + 1 for i, w in enumerate(WORDS)}  # 0 = nothing here
SUBJECTS = [*WORDS, *lex.COLOURS]
SUBJECT_ID = {w: i + 1 for i, w in enumerate(SUBJECTS)}
CHAR_ID = {c: i + 1 for i, c in enumerate(CHARS)}
TRAITS = [*lex.COLOURS, "%", "$"]  # the colour of an object, or the unit of a printed number
TRAIT_ID = {t: i + 1 for i, t in enumerate(TRAITS)}
IGNORE = -100
SYMBOLIC = ("lookup", "calls")  # stages of the language tower alone, on symbolic pages
PICTURED = ("joint", "review")  # stages of both towers, on pictures
ASKING = (*SYMBOLIC, *PICTURED)  # stages with questions
CALLING = ("calls", *PICTURED)  # stages with calls of functions about pictures
CALLED = {
    "calls": 0.85,
    "joint": 0.6,
    "review": 0.9,
}  # in those, the share of pictures with parts whose parts are the result of a call
# and of the other pictures, the share with questions that ask for a call whose argument is to be looked up
GROUNDED = {"calls": 0.3, "joint": 0.3, "review": 0.85}
ASKED = 0.5  # of their questions, the share that asks for it
LOCATED = 0.85  # of which the share where the argument is the part of the picture that holds an answer's evidence, not the answer
TIGHT = 0.5  # of the questions behind a call, the share whose part is a smallest one that holds the evidence
SMALL_WANTED = 0.6  # of the questions behind a call, the share about what half resolution does not show, where there is such a thing
# share of the full and half views whose system message asks to say so where something is too small to read; there the base also learns
# how likely it is to misread the rest (`pretrain.doubted`)
CANDID = {"review": 0.6}
TWICE = {"review": ("count", "pair", "bars")}  # kinds of questions that come up twice as often: those read worst
LINKS = 2  # words that lead to what stands on a patch
VALUES = ("field", "bar", "sign", "plate", "badge")  # kinds of questions about one value that something else leads to
# shares of painters and of views by stage; the vision tower learns most from full pages
PAINTER_SHARES = {
    "glyphs": {"wall": 1.0},
    "words": {"page": 0.1, "chart": 0.1, "signs": 0.1, "objects": 0.15, "wall": 0.55},
    "vision": {"page": 0.2, "chart": 0.24, "signs": 0.09, "objects": 0.12, "collage": 0.05, "ledger": 0.3},
    "lookup": {"page": 0.24, "chart": 0.18, "signs": 0.2, "objects": 0.3, "collage": 0.08},
    "calls": {"page": 0.24, "chart": 0.22, "signs": 0.2, "objects": 0.26, "collage": 0.08},
    "joint": {"page": 0.24, "chart": 0.26, "signs": 0.2, "objects": 0.22, "collage": 0.08},
    "review": {"page": 0.16, "chart": 0.16, "signs": 0.28, "objects": 0.32, "collage": 0.08},  # what is read worst
}
_SEES = {"full": 0.65, "half": 0.2, "part": 0.15}
VIEW_SHARES = {
    "glyphs": _SEES,
    "words": _SEES,
    "vision": {"full": 0.45, "half": 0.4, "part": 0.15},  # a half view has a quarter of the patches
    "lookup": {"full": 0.4, "half": 0.2, "part": 0.1, "group": 0.3},
    "calls": {"full": 0.1, "half": 0.1, "part": 0.05, "group": 0.75},
    "joint": {"full": 0.35, "half": 0.25, "part": 0.05, "group": 0.35},
    "review": {"full": 0.17, "half": 0.33, "part": 0.03, "group": 0.47},
}


# --- the architecture ------------------------------------------------------------------------------------------------


def build_tokenizer(seed: int = 0, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's special tokens, numbers in pairs of digits, trained on what the suite says.

    Not a `Qwen2Tokenizer`: when that is loaded, it puts Qwen's own pattern, digits one by one, in place of the saved one.
    """
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(np.random.default_rng(seed)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        additional_special_tokens=SPECIALS,
    )  # fmt: skip


def _corpus(rng: np.random.Generator) -> Iterator[str]:
    vocabulary = [*WORDS, *lex.NUMBER_WORDS, *lex.COLOURS, *lex.PLACES]
    vocabulary += "violet rose dark upper lower left right middle top bottom all".split()
    vocabulary += [
        "yes",
        "no",
        "percent",
        "dollars",
        "kilos",
        "user",
        "system",
        "assistant",
        "tool",
        "error",
        "such",
        "region",
        *lex.SYSTEMS,
    ]
    for word in vocabulary * 40:
        yield f"{word}"
        yield f" {word}"
    for phrasings in lex.PHRASINGS.values():
        for text in phrasings * 40:
            yield text.format(k="", c="", o="", s="", a="", b="")
    for _ in range(2000):
        one = text_example(rng)
        yield "\n".join([one.system, *(part for turn in one.turns for part in turn)])


def tiny_config(
    tokenizer: PreTrainedTokenizerFast, vision_width: int = 160, width: int = 192, depth: int = 6
) -> Qwen2_5_VLConfig:
    ids: dict[str, Any] = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 512, "num_hidden_layers": depth,
            "num_attention_heads": width // 32, "num_key_value_heads": width // 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [1, 2, 13]}, "initializer_range": 0.03,
            "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": depth, "hidden_size": vision_width, "intermediate_size": 448, "num_heads": vision_width // 32, "out_hidden_size": width,
            "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [2, 4, 5],
        },
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=False,
    )  # fmt: skip


class DenseHeads(torch.nn.Module):
    """What stands on each 14 px patch (word, trait, whose value it is), and in each 7 px cell (glyph); used in base training only.

    Glyphs are read half-way up the vision tower, words before its last block, so that this block can carry them to the values they lead to.
    """

    def __init__(self, config: Qwen2_5_VLConfig) -> None:
        super().__init__()
        parts: Any = config  # its halves are declared as dicts too
        width = parts.vision_config.hidden_size
        self.glyphs = torch.nn.Linear(width, 4 * (len(CHARS) + 1))
        self.early = torch.nn.Linear(width, len(WORDS) + 1)
        self.words = torch.nn.Linear(width, len(WORDS) + 1)
        self.traits = torch.nn.Linear(width, len(TRAITS) + 1)
        self.links = torch.nn.Linear(width, LINKS * (len(SUBJECTS) + 1))


# --- examples --------------------------------------------------------------------------------------------------------


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


def example(rng: np.random.Generator, stage: str, questions: int = 10) -> Example:
    """One conversation about one picture: whole, halved, a part of it, or a halved view with parts of it."""
    silent = stage not in ASKING
    if not silent and rng.random() < 0.06:
        return text_example(rng)
    painter = _drawn(rng, PAINTER_SHARES[stage])
    draw = scenes.draw if stage in SYMBOLIC else scenes.paint  # symbolic pages need no camera
    scene = draw(painter, rng, scenes.SIZES[int(rng.integers(len(scenes.SIZES)))])
    kind = _drawn(rng, VIEW_SHARES[stage])
    if painter == "ledger" and kind == "half":  # its keys may be small
        kind = "full"
    regions: list[scenes.PixelBox] = []
    if kind in ("part", "group"):
        names = [c for c in CROPS if c != "all"]
        count = 2 if kind == "group" and rng.random() < 0.2 else 1
        regions = [CROPS[str(c)] for c in rng.choice(names, count, replace=False)]
    wanted = _wanted(rng, scene, stage) if kind == "group" and stage in CALLING else None
    # the first part shows what is asked behind a call: drawn blindly, hardly one holds both values of a pair
    if wanted:
        parts = [str(part) for part in rng.permutation(list(CROPS))]
        fitting = [part for part in parts if _inside(scene, CROPS[part], wanted)]
        regions[0] = CROPS[min(fitting, key=crops.area) if rng.random() < TIGHT else fitting[0]]
    views = [view(scene, halve=kind != "full")] if kind in ("full", "half", "group") else []
    views += [view(scene, region) for region in regions]
    if silent:
        return Example(views)
    order = _balanced(rng, [qa for qa in scene.qas if _answerable(qa, kind, views)], TWICE.get(stage, ()))[:questions]
    candid = stage in CANDID and kind in ("full", "half") and rng.random() < CANDID[stage]
    if candid and kind == "half":
        unread = [_unread(qa) for qa in _balanced(rng, [qa for qa in scene.qas if qa.small])[: questions // 2]]
        order = order[: questions - len(unread)] + unread
        order = [order[i] for i in rng.permutation(len(order))]
    late = 0
    if (
        kind == "group" and rng.random() < 0.5
    ):  # the parts come in a later turn; what was asked before needs the first view alone
        early = [qa for qa in order if not qa.small]
        order = early[:2] + [qa for qa in order if qa not in early[:2]]
        late = min(len(early), 2)
    dice = rng.random()
    system = text_example(rng).system if dice < 0.12 else str(rng.choice(lex.SYSTEMS)) if dice < 0.3 else lex.SYSTEMS[0]
    if candid:
        name, argument, offered, _ = _function(rng)
        system = str(rng.choice(lex.CANDID)) + (f"\n{_offer(name, argument, offered)}" if rng.random() < 0.5 else "")
    call = ""
    if wanted and rng.random() < CALLED[stage]:
        early = [qa for qa in order if not qa.small and qa is not wanted][: int(rng.integers(3))]
        order = [*early, wanted, *(qa for qa in order if qa not in early and qa is not wanted)]
        order, late = order[: len(early) + 4], len(early)
        name, argument, offered, words = _function(rng, bool(rng.random() < 0.5))
        call = _call(name, argument, words)
        if rng.random() < 0.7:
            system += f"\n{_offer(name, argument, offered)}"
    asking: list[bool] = [False] * len(order)
    if stage in CALLING and not call and not candid and rng.random() < GROUNDED[stage]:
        name, argument, offered, _ = _function(rng)
        asking = [bool(rng.random() < ASKED) for _ in order]
        if kind != "part" and rng.random() < LOCATED:
            offered = [str(place) for place in rng.permutation(list(CROPS))]
            places = _located(rng, scene, views[0])
            asking = [ask and index < len(places) for index, ask in enumerate(asking)]
            order = [place if ask else qa for qa, place, ask in zip(order, places + order, asking, strict=False)]
        system = f"{lex.SYSTEMS[0]}\n{_offer(name, argument, offered)}"
    turns = [(qa.question, qa.answers[qa.form]) for qa in order]
    turns = [_as_call(*turn, name, argument) if ask else turn for ask, turn in zip(asking, turns, strict=True)]
    whole = views[:1] if stage in CALLING else views  # a part does not tell a place in the whole
    trails = [trail(qa, scene, whole if qa.kind in ("place", "unread") else views) for qa in order]
    return Example(views, turns, system, late if late < len(order) else 0, trails, call, candid)


def _wanted(rng: np.random.Generator, scene: scenes.Scene, stage: str) -> scenes.QA | None:
    """A question to ask behind a call, of a kind drawn first and mostly about something small; None where nothing can be asked."""
    pool = [qa for qa in scene.qas if qa.kind != "place" and _inside(scene, CROPS["all"], qa)]
    small = [qa for qa in pool if qa.small]
    asked = _balanced(rng, small if small and rng.random() < SMALL_WANTED else pool, TWICE.get(stage, ()))
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
    names = crops.boxes_to_crops([box], PAPER_CROPS)
    return names[0] if len(names) == 1 else "all"


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


def _function(rng: np.random.Generator, of_places: bool = False) -> tuple[str, str, list[str], list[str]]:
    """A random function, never the crop tool: its name, its argument, what may be asked for (things, or places alone) and what is."""
    pool = [*lex.PLACES, "top", "bottom", "left", "right", "all"]
    pool += [] if of_places else [*lex.SHAPES, *lex.ITEMS, *lex.CITIES]
    offered = [str(w) for w in rng.choice(pool, int(rng.integers(3, 8)), replace=False)]
    words = offered[: int(rng.integers(1, 4))]
    verb, argument = str(rng.choice(_VERBS)), str(rng.choice(_ARGUMENTS))
    return f"{verb}_{rng.choice(lex.ANIMALS)}", argument, offered, words


def _offer(name: str, argument: str, words: list[str]) -> str:
    return f"<tools>\n{json.dumps({'name': name, 'arguments': {argument: words}})}\n</tools>"


def _call(name: str, argument: str, words: list[str]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': {argument: words}})}\n</tool_call>"


def _as_call(question: str, answer: str, name: str, argument: str) -> tuple[str, str]:
    """The request to call a function with the answer to a question, and that call."""
    return f"{name.split('_')[0]} {question}", _call(name, argument, [answer])


def text_example(rng: np.random.Generator) -> Example:
    """Text alone: call a function that the system message offers and report its result, or repeat words.

    The functions are random and never the crop tool; between them every token of a tool call and of its answer is used.
    """
    name, argument, offered, words = _function(rng)
    verb = name.split("_")[0]
    system = " ".join(
        [lex.SYSTEMS[0], *(str(s) for s in rng.choice(lex.SYSTEMS[1:], int(rng.integers(0, 3)), replace=False))]
    )
    draw = rng.random()
    if draw < 0.7:
        offer = _offer(name, argument, rng.permutation(offered).tolist())
        result = " ".join(str(w) for w in rng.choice(WORDS, int(rng.integers(1, 3))))
        if rng.random() < 0.15:
            result = f"error: no such {result}"
        turns = [(f"{verb} {' and '.join(words)}.", _call(name, argument, words))]
        turns += [(f"<tool_response>\n{result}\n</tool_response>", result)]
        return Example(turns=turns, system=f"{system}\n{offer}")
    if draw < 0.85:
        return Example(turns=[(f"repeat as a list: {' and '.join(words)}", json.dumps(words))], system=system)
    return Example(
        turns=[(f"repeat: {argument} {verb} {' '.join(words)}", f"{argument} {verb} {' '.join(words)}")], system=system
    )
