"""The training loop of the embedded base VLM (notebooks/00_base_model): batches, losses, checkpoints, progress.

Seven stages, each with its checkpoint: the lower half of the vision tower on glyphs, the whole of it on words and then on what belongs to what,
the language tower on symbolic pages and then on calls about them, and both towers on pictures, twice. The two of the language tower need none of
the first three and may run beside them. ``base.begin`` names a later stage to go on from a finished model, without its checkpoints (`reopen`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from awares.config import Base
from awares.engine.chat_format import TOOL_CALL
from awares.engine.model import load_model, make_processor, save_model
from awares.errors import AwaresError
from awares.mini import base, lookup, scenes
from awares.mini import vocabulary as lex
from awares.mini.base import (
    ASKING,
    IGNORE,
    LINKS,
    PATCH,
    PICTURED,
    SYMBOLIC,
    TOKEN,
    WORDS,
    DenseHeads,
    Example,
    Trail,
    View,
    build_tokenizer,
    example,
    tiny_config,
)
from awares.mini.lookup import ROWS, SPREAD, VALUE_LAYER, Code, Glance, Watch, prepare
from awares.training import checkpoints as training

MEAN, STD = (
    np.array(v, np.float32) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)


def patchify(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (patches, 3·2·14·14) in the order of Qwen2VLImageProcessor (tested equal)."""
    pixels = ((image.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)
    rows, columns = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
    grid = pixels.reshape(3, rows // 2, 2, PATCH, columns // 2, 2, PATCH).transpose(1, 4, 2, 5, 0, 3, 6)
    return np.repeat(grid[:, :, :, :, :, None], 2, axis=5).reshape(rows * columns, -1)


def _merge_order(grid: np.ndarray, cell: int) -> np.ndarray:
    """(rows·cell, columns·cell) targets -> (patches, cell·cell) in patch order of the processor."""
    rows, columns = grid.shape[0] // cell, grid.shape[1] // cell
    blocks = grid.reshape(rows // 2, 2, cell, columns // 2, 2, cell).transpose(0, 3, 1, 4, 2, 5)
    return blocks.reshape(rows * columns, cell * cell)


def encode(item: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids and labels (assistant tokens only) of a conversation in the chat template's words."""
    pads = [f"<|vision_start|>{'<|image_pad|>' * (v.words.size // 4)}<|vision_end|>" for v in item.views]
    shown = {0: pads} if item.late == 0 else {0: pads[:1], item.late: pads[1:]}
    pieces = [(f"<|im_start|>system\n{item.system}<|im_end|>\n", False)]
    for index, (question, answer) in enumerate(item.turns):
        fresh = "".join(shown.get(index, []))
        if item.call and index == item.late:
            seen = "".join(pads[:1]) if index == 0 else ""
            pieces.append((_turns(f"{seen}{question}", item.call), False))
            fresh, question = f"<tool_response>\n{''.join(pads[1:])}\n</tool_response>", ""
        pieces.append((_turns(f"{fresh}{question}"), False))
        pieces += [(f"{answer}<|im_end|>", True), ("\n", False)]
    if not item.turns:
        pieces.append((f"<|im_start|>user\n{''.join(pads)}", False))
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if learned else [IGNORE] * len(tokens)
    return ids, labels


def _turns(asked: str, given: str = "") -> str:
    """The user's turn and the beginning of the assistant's; with an answer that is given, that one and no more."""
    end = f"{given}<|im_end|>\n" if given else ""
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{end}"


def collate(items: list[Example], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Right-padded batch: ids, labels, called (the answers after a call), candid (the answers that may be doubted, numbered) (B, T); pixel_values
    (P, 1176); dense targets (P, 1), (P, 1), (P, 4).
    """
    rows = [encode(item, tokenizer) for item in items]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORE)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, (row, target) in enumerate(rows):
        ids[i, : len(row)], labels[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), torch.tensor(target), 1
    pad: Any = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    called = torch.stack([_after_call(item, row) for item, row in zip(items, labels, strict=True)])
    candid = torch.stack(
        [_doubtful(item, row, i * length) for i, (item, row) in enumerate(zip(items, labels, strict=True))]
    )
    watched = _watched(items, ids, labels, tokenizer)
    views: list[View] = [v for item in items for v in item.views]
    stack = lambda parts: torch.from_numpy(np.concatenate(parts))  # noqa: E731
    return {
        "input_ids": ids, "labels": labels, "attention_mask": mask, "called": called, "candid": candid,
        "mm_token_type_ids": torch.eq(ids, pad).long(), **watched,
        "pixel_values": stack([patchify(np.asarray(v.image)) for v in views]),
        "image_grid_thw": torch.tensor([[1, *v.words.shape] for v in views]),
        "words": stack([_merge_order(v.words, 1) for v in views]), "traits": stack([_merge_order(v.traits, 1) for v in views]),
        "glyphs": stack([_merge_order(v.glyphs, 2) for v in views]),
        "links": stack([np.stack([_merge_order(v.links[..., i], 1)[:, 0] for i in range(LINKS)], -1) for v in views]),
        "leads": _leads(views),
    }  # fmt: skip


def _turn_of(labels: torch.Tensor) -> torch.Tensor:
    """(T,) of a token of an answer, which answer of its conversation it belongs to, from 1; elsewhere 0."""
    learned = torch.ne(labels, IGNORE)
    before = torch.cat([torch.zeros(1, dtype=torch.bool), learned[:-1]])
    return (learned & ~before).cumsum(0) * learned


def _after_call(item: Example, labels: torch.Tensor) -> torch.Tensor:
    """(T,) whether a token belongs to the answer that the conversation's call was made for."""
    return (_turn_of(labels) == item.late + 1) & bool(item.call)


def _doubtful(item: Example, labels: torch.Tensor, offset: int) -> torch.Tensor:
    """(T,) a number of its own, above ``offset``, for each answer that might be doubted, on its tokens; elsewhere 0."""
    turn = _turn_of(labels)
    read = torch.tensor([False, *(item.candid and answer != lex.UNREAD for _, answer in item.turns)])
    return (turn + offset) * read[turn]


def _leads(views: list[View]) -> torch.Tensor:
    """(N, 4): picture, which link, and the two patches of each lead in the processor's order."""
    found = [torch.zeros((0, 4), dtype=torch.long)]
    for picture, one in enumerate(views):
        if one.leads:
            order = _merge_order(np.arange(one.words.size).reshape(one.words.shape), 1)[:, 0]
            slot, value, source = np.array(one.leads).T
            places = np.argsort(order)
            found.append(
                torch.from_numpy(np.stack([np.full_like(slot, picture), slot, places[value], places[source]], 1))
            )
    return torch.cat(found)


GROUP = 4
BLUR = 0.8  # at most, in embeddings
BOUNDS = (0.3, 0.5, 0.7)  # of a side: what `lexicon.place` tells apart
DENSE = {
    "glyph": 0.5,
    "early": 1,
    "word": 1,
    "trait": 0.5,
    "link": 1,
    "glance": 0.5,
    "code": 1,
    "misread": 1,
}  # weights of the dense losses
# the head of a dense loss, where in the vision tower it reads, and what its log says
HEADS = {
    "glyph": ("glyphs", "middle", "glyphs_read"),
    "early": ("early", "early", ""),
    "word": ("words", "late", "words_read"),
    "trait": ("traits", "late", ""),
    "link": ("links", "late", "links_read"),
}
ASKED = {"glyphs": ("glyph",), "words": ("glyph", "early", "word", "trait")}  # by stage; all of them afterwards
# the stages in order, and what each begins with
STAGES: dict[str, tuple[str, ...]] = {
    "glyphs": (),
    "words": ("glyphs",),
    "vision": ("words",),
    "lookup": (),
    "calls": ("lookup",),
    "joint": ("vision", "calls"),
    "review": ("joint",),
}
HEAD_STEPS, HEAD_RATE = 160, 4e-3  # of the dense heads that `reopen` trains anew
EMPTY = 0.25  # weight of cells where nothing stands
# weight of the answer that a call was made for, by stage, elsewhere 1: there is one a conversation
AFTER_CALL = {"review": 4.0}


def _watched(
    items: list[Example], ids: torch.Tensor, labels: torch.Tensor, tokenizer: PreTrainedTokenizerFast
) -> dict[str, torch.Tensor]:
    """For each answer token that is looked up, from where (the token before it) and to where; see `Watch.expect`."""
    special: list[Any] = [tokenizer.convert_tokens_to_ids(t) for t in ("<|image_pad|>", "<|im_start|>", "<|im_end|>")]
    pad, start, stop = (torch.eq(ids, token) for token in special)  # (B, T) each
    rows, positions, subject, evidence = [], [], [], []
    for row, item in enumerate(items):
        words = [str(word) for word in tokenizer.convert_ids_to_tokens(ids[row].tolist())]
        learned = torch.ne(labels[row], IGNORE)
        begins = (learned[1:] & ~learned[:-1]).nonzero()[:, 0] + 1
        openings, pads = start[row].nonzero()[:, 0], pad[row].nonzero()[:, 0]
        for turn, (begin, path) in enumerate(zip(begins.tolist(), item.trails, strict=False)):
            back = 4 if item.call and turn == item.late else 2  # call and result stand between question and answer
            asked, replied = openings[openings < begin][[-back, 1 - back]].tolist()
            end = begin + int(stop[row, begin:].nonzero()[0])
            if item.turns[turn][1].startswith(TOOL_CALL):  # what is looked up stands in its brackets
                begin = next(at for at in range(begin, end) if words[at].endswith('["')) + 1
                end = next(at for at in range(begin, end) if words[at].startswith('"]'))
            for position, part, word in _read_off(path, words, begin, end):
                target = _shown(item.views, path, part, word, pads, position, ids.shape[1])
                if target is None:
                    continue
                names = path.subjects[min(part, len(path.subjects) - 1)]
                bare = [w.removeprefix(SPACE) for w in words[asked:replied]]
                told = torch.zeros(ids.shape[1], dtype=torch.bool)
                told[[asked + i for i, w in enumerate(bare) if w in names or w.removesuffix("s") in names]] = True
                rows.append(row)
                positions.append(position - 1)
                subject.append(told)
                evidence.append(target)
    if not rows:
        return {}
    return {"watch_rows": torch.tensor(rows), "watch_positions": torch.tensor(positions), "watch_subject": torch.stack(subject),
            "watch_evidence": torch.stack(evidence)}  # fmt: skip


SPACE = "Ġ"  # how the tokenizer writes a space before a word


def _read_off(path: Trail, words: list[str], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(position, part of the trail, word of that part) of an answer's tokens, but for the `and` between two parts."""
    part, word = 0, 0
    for position in range(begin, end):
        more = part + 1 < len(path.places)
        joining = more and words[position] in ("and", f"{SPACE}and")
        if more and position > begin and words[position - 1] in ("and", f"{SPACE}and"):
            part, word = part + 1, 0
        elif path.by_word and position > begin and words[position].startswith(SPACE) and not joining:
            word += 1
        if not joining:
            yield position, part, word


def _shown(
    views: list[View], path: Trail, part: int, word: int, pads: torch.Tensor, position: int, length: int
) -> torch.Tensor | None:
    """Where a word of an answer stands, (ROWS, length); all False where the trail does not tell, None where no one printed it yet."""
    target = torch.zeros(ROWS, length, dtype=torch.bool)
    if not path.places:
        return target
    if word >= len(path.places[part]):
        return None
    first = np.cumsum([0, *(view.tokens for view in views)])  # of each view among the pads
    for view, token, line in path.places[part][word]:
        target[line, pads[first[view] + token]] = True
    if target.any() and not target[:, :position].any():
        return None  # shown later
    target[:, position:] = False
    target[~target.any(1), 0] = True  # a row of heads with nothing to see rests on the first token
    return target


def _work(item: Example, stage: str) -> int:
    """Cost of an example in patches; a token of the language tower costs about as much as a patch of the vision tower."""
    seen = sum(v.words.size for v in item.views)
    read = sum(v.tokens for v in item.views) + 20 * len(item.turns) + len(item.system) // 3
    return read if stage in SYMBOLIC else seen + read if stage in PICTURED else seen


class Batches(torch.utils.data.IterableDataset):
    """Batch k depends on (seed, k) alone, so that a resumed run sees what an undisturbed one sees (but for `Network`'s blur of symbols)."""

    def __init__(self, recipe: Base, tokenizer: PreTrainedTokenizerFast, stage: str, start: int, stop: int) -> None:
        self.recipe, self.tokenizer, self.stage, self.start, self.stop = recipe, tokenizer, stage, start, stop

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(self.start - self.start % GROUP, self.stop, GROUP):
            for offset, items in enumerate(self._group(step)):
                if self.start <= step + offset < self.stop:
                    yield collate(items, self.tokenizer)

    def _group(self, step: int) -> list[list[Example]]:
        """GROUP batches of equal work, drawn together and cut by length, so that little of a batch is padding."""
        rng = np.random.default_rng([self.recipe.seed, *self.stage.encode(), step])
        items: list[Example] = []
        while sum(_work(i, self.stage) for i in items) < GROUP * Stage.of(self.stage, self.recipe).work:
            items.append(example(rng, self.stage))
        items.sort(key=lambda i: _work(i, self.stage))
        ends = np.cumsum([_work(i, self.stage) for i in items])
        batches = [
            [i for i, e in zip(items, ends, strict=True) if b < e * GROUP / ends[-1] <= b + 1] for b in range(GROUP)
        ]
        return [
            batches[i] for i in rng.permutation(GROUP) if any(v for item in batches[i] for v in item.views)
        ] or batches


class Dense:
    """The losses on what the vision tower sees; hooks catch what three of its blocks and its merger put out, in window order."""

    def __init__(self, visual: Any, heads: DenseHeads, code: Code) -> None:
        self.visual, self.heads, self.code = visual, heads, code
        self._seen: dict[str, torch.Tensor] = {}
        depth = visual.config.depth
        for name, place in {"middle": depth // 2, "early": depth - 2, "late": depth - 1}.items():  # (P, Dv)
            visual.blocks[place].register_forward_hook(partial(self._catch, name))
        visual.merger.register_forward_hook(partial(self._catch, "merged"))  # (P/4, D)
        self.glance = Glance(visual)

    def expect(self, batch: dict[str, torch.Tensor]) -> None:
        """To be called before the forward pass of the vision tower: where its last block should look."""
        tokens = torch.argsort(
            _window_order(self.visual, batch["image_grid_thw"])
        )  # of the processor's order -> place in the tower
        leads, targets, start = batch["leads"], [], 0
        for picture, size in enumerate(batch["image_grid_thw"].prod(1).tolist()):
            place = (tokens[start : start + size // 4, None] - start) * 4 + torch.arange(4)
            target = torch.zeros(LINKS, size, size, dtype=torch.bool)
            mine = leads[leads[:, 0] == picture, 1:]
            target[mine[:, 0], place.flatten()[mine[:, 1]], place.flatten()[mine[:, 2]]] = True
            targets.append(target)
            start += size // 4
        self.glance.expect(targets)

    def _catch(self, name: str, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        self._seen[name] = (
            output if name == "merged" else F.rms_norm(output, output.shape[-1:])
        )  # blocks put out sums of any size

    def _in_order(self, batch: dict[str, torch.Tensor], *names: str) -> list[torch.Tensor]:
        order = _window_order(self.visual, batch["image_grid_thw"])  # (P/4,)
        return [batch[k].reshape(len(order), 4, *batch[k].shape[1:])[order] for k in names]

    def __call__(
        self, batch: dict[str, torch.Tensor], asked: tuple[str, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The losses ``asked`` for, of DENSE, after a forward pass of the vision tower, and what to log."""
        words, traits, links, glyphs = self._in_order(batch, "words", "traits", "links", "glyphs")
        words, traits = words[..., 0], traits[..., 0]
        targets = {"glyph": glyphs, "early": words, "word": words, "trait": traits, "link": links}
        total = torch.zeros(())
        seen: dict[str, torch.Tensor] = {}
        for name in asked:
            if name == "code":
                loss = self._written(words, traits, links, seen)
            elif name == "misread":
                loss = self.code.misread(self._seen["merged"], words, traits, links)
            elif name == "glance":
                loss, seen["sources_found"] = self.glance.found()
            else:
                head, place, read = HEADS[name]
                target = targets[name].flatten()
                logits = getattr(self.heads, head)(self._seen[place]).reshape(len(target), -1)
                loss = _dense(logits, target)
                if read:
                    seen[read] = _share(logits, target)
            total = total + DENSE[name] * loss
            seen[name] = loss.detach()
        return total, seen

    def _written(
        self, words: torch.Tensor, traits: torch.Tensor, links: torch.Tensor, seen: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """How far the visual tokens are from their code, where all that they show is known."""
        code = self.code(words, traits, links)
        far = self.code.distance(self._seen["merged"], code)
        known = ((words != IGNORE) & (traits != IGNORE) & (links != IGNORE).all(-1)).all(1)
        full = known & (
            (words > 0).any(1) | (traits > 0).any(1) | (links > 0).any((1, 2))
        )  # also a value too small to read
        seen["code_missed"] = far.detach()[full].sum() / self.code.distance(code[full], torch.zeros(1)).sum()
        return far[full].mean() + EMPTY * far[known & ~full].mean()


def _share(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of the cells where something stands, how many are named rightly."""
    return (logits.detach().argmax(-1) == target)[target > 0].float().mean()


def _dense(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with empty cells weighted down, so that emptiness does not win."""
    each = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    filled, empty = target > 0, target == 0
    return each[filled].sum() / filled.sum().clamp(min=1) + EMPTY * each[empty].sum() / empty.sum().clamp(min=1)


def _window_order(visual: Any, grid: torch.Tensor) -> torch.Tensor:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

    config = visual.config
    order, _ = get_vision_window_index(
        grid, spatial_merge_size=config.spatial_merge_size, window_size=config.window_size, patch_size=config.patch_size
    )
    return order


@dataclass(frozen=True)
class Stage:
    """`glyphs` (half the vision tower, on print), `words` (all of it, on what stands where), `vision` (and whose value it is), `lookup` (the
    language tower, on symbolic pages), `calls` (the same, with calls of functions), `joint` (both towers, on pictures), or `review` (the
    same, with more of what is read worst)."""

    name: str
    steps: int
    learning_rate: float
    work: int

    @classmethod
    def of(cls, name: str, recipe: Base) -> Stage:
        return cls(name, **asdict(recipe.stages[name]))


class Network:
    """The model with the dense heads, and what a stage trains of it."""

    def __init__(self, recipe: Base, tokenizer: PreTrainedTokenizerFast, stage: str) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer)).float().train()
        self.heads = DenseHeads(self.model.config)
        self.code = Code(tokenizer, self.model.config.text_config.hidden_size, recipe.seed)
        self.dense = Dense(self.model.model.visual, self.heads, self.code)
        self.recipe, self.stage = recipe, stage
        self.unread = tokenizer(lex.UNREAD, add_special_tokens=False)["input_ids"][0]
        if stage in ASKING:
            self.watch = Watch(self.model)
            prepare(self.model, self.code)
        visual: Any = self.model.model.visual
        if stage not in ASKING:
            _spread(visual)
        if stage == "glyphs":
            del visual.blocks[visual.config.depth // 2 + 1 :]  # above, nothing is read off yet
        self.placing = torch.nn.Linear(self.model.config.text_config.hidden_size, 2 * (len(BOUNDS) + 1))
        language: Any = self.model.model.language_model
        language.layers[VALUE_LAYER].register_forward_pre_hook(self._catch, with_kwargs=True)
        every = {f"model.{k}": v for k, v in self.model.named_parameters()} | {
            f"heads.{k}": v for k, v in self.heads.named_parameters()
        }
        every |= {f"placing.{k}": v for k, v in self.placing.named_parameters()}
        sees = lambda name: name.startswith(("model.model.visual.", "heads."))  # noqa: E731
        self.parameters = {k: v for k, v in every.items() if stage in PICTURED or sees(k) == (stage not in SYMBOLIC)}

    def begin(self, work: Path) -> None:
        """Take what the stages before this one left in `work`."""
        if self.stage == "glyphs":
            rng = np.random.default_rng(self.recipe.seed)
            views = [view for _ in range(90) for view in example(rng, self.stage).views]
            _whiten(self.model.model.visual, np.concatenate([patchify(np.asarray(v.image)) for v in views]))
        for stage in STAGES[self.stage]:
            state = load_file(_checkpoint(work, stage))
            for name, value in self.parameters.items():
                if f"p.{name}" in state:
                    value.data.copy_(state[f"p.{name}"])

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, and what to log."""
        asked = ASKED.get(self.stage, tuple(DENSE))
        if self.stage not in ASKING:
            if "glance" in asked:
                self.dense.expect(batch)
            self.model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
            return self.dense(batch, asked)
        if self.stage in PICTURED:
            self.dense.expect(batch)
        total, parts = self._answers(batch)
        if self.stage in PICTURED:
            seen, more = self.dense(batch, asked)
            return total + seen, parts | more
        return total, parts

    def _answers(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs: dict[str, Any] = {
            k: batch[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        }
        if self.stage in PICTURED:
            inputs["pixel_values"] = batch["pixel_values"]
        else:
            symbols: Any = self._symbols(batch)  # declared as one tensor, taken as one a picture
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=symbols)}
        self.watch.expect({k.removeprefix("watch_"): v for k, v in batch.items() if k.startswith("watch_")})
        hidden = self.model.model(**inputs).last_hidden_state  # (B, T, D)
        target = batch["labels"][:, 1:]
        learned = target != IGNORE
        logits = self.model.lm_head(hidden[:, :-1][learned])  # (N, V): answers only, the rest would be wasted work
        weights = 1 + (AFTER_CALL.get(self.stage, 1.0) - 1) * batch["called"][:, 1:][learned].float()
        each = doubted(logits, target[learned], batch["candid"][:, 1:][learned], self.unread)
        answer = (weights * each).sum() / weights.sum()
        place = self._placed(batch)
        missed, found = self.watch.found()
        hits = (logits.argmax(-1) == target[learned]).float().mean()
        return answer + missed + place, {
            "answer": answer.detach(),
            "place": place.detach(),
            "answer_tokens": hits,
            **found,
        }

    def _catch(self, _module: Any, arguments: Any, named: Any) -> None:
        self._before_value = arguments[0] if arguments else named["hidden_states"]

    def _placed(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of telling, from a visual token before the value layer, in which part of its picture it lies."""
        shown = batch["mm_token_type_ids"] == 1
        if not shown.any():
            return torch.zeros(())
        logits = self.placing(self._before_value[shown]).unflatten(-1, (2, -1))  # (N, axis, part)
        bounds = torch.tensor(BOUNDS)
        targets = []
        for _, rows, columns in batch["image_grid_thw"].tolist():
            middles = [(torch.arange(n // 2) + 0.5) / (n // 2) for n in (rows, columns)]
            targets.append(torch.cartesian_prod(*(torch.bucketize(middle, bounds) for middle in middles)))
        return F.cross_entropy(logits.flatten(0, 1), torch.cat(targets).flatten())

    def _symbols(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The code of each picture, (tokens, D), blurred: what a vision tower that reads imperfectly would write."""
        by_token = lambda t: t.reshape(-1, 4, *t.shape[1:])  # noqa: E731
        code = self.code(by_token(batch["words"])[..., 0], by_token(batch["traits"])[..., 0], by_token(batch["links"]))
        pictures = code.split((batch["image_grid_thw"].prod(1) // 4).tolist())
        blur = lambda picture: picture + BLUR * SPREAD * torch.rand(()) * torch.randn_like(picture)  # noqa: E731
        return tuple(blur(picture) for picture in pictures)


def doubted(logits: torch.Tensor, target: torch.Tensor, answers: torch.Tensor, unread: int) -> torch.Tensor:
    """Cross-entropy (N,) of ``logits`` (N, V) with ``target`` (N,), where an answer may also be that it cannot be read.

    Tokens with the same number in ``answers`` (N,), in order, are an answer that may be doubted; 0: none of it. Such an answer gives way to
    ``unread``, the first token of saying so, with the probability that the model itself would misread it, had it to commit itself.
    """
    each = F.cross_entropy(logits, target, reduction="none")
    if not answers.any():
        return each
    names, place = answers.unique(return_inverse=True)
    first = torch.ones_like(answers, dtype=torch.bool)
    first[1:] = answers[1:] != answers[:-1]
    first &= answers > 0
    with torch.no_grad():
        admitted = F.log_softmax(logits[first], -1)[:, unread]
        right = -each.detach()
        right[first] -= torch.log1p(-admitted.exp().clamp(max=1 - 1e-6))  # of the answers that commit themselves
        doubt = 1 - torch.zeros(len(names)).index_add_(0, place, right).exp().clamp(max=1)  # of each answer
        doubt[names == 0] = 0
        doubt = doubt[place]
    unsaid = torch.full_like(target, unread)
    said = torch.where(first, F.cross_entropy(logits, unsaid, reduction="none"), torch.zeros(()))
    return (1 - doubt) * each + doubt * said


def _spread(visual: Any) -> None:
    """Draw the blocks' matrices at the scale of their widths: at transformers' 0.02 a tower as narrow as this one barely speaks."""
    for name, weight in visual.blocks.named_parameters():
        if weight.ndim == 2:
            branch_end = name.endswith(("attn.proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(
                weight, std=(weight.shape[1] * (2 * visual.config.depth if branch_end else 1)) ** -0.5
            )


def _whiten(visual: Any, patches: np.ndarray) -> None:
    """Begin with filters that make the strongest components of `patches` (P, 3·2·14·14) equally loud: print is faint beside paper."""
    filters = visual.patch_embed.proj.weight  # (Dv, 3, 2, 14, 14)
    seen = torch.from_numpy(patches).double()
    loudness, components = torch.linalg.eigh(seen.T @ seen / len(seen))
    loudness, components = loudness[-len(filters) :], components[:, -len(filters) :]
    turn = torch.linalg.qr(torch.randn(len(filters), len(filters), dtype=torch.float64))[0]
    floor = 0.01 * loudness[len(filters) // 2]
    with torch.no_grad():
        filters.copy_((turn @ ((loudness + floor).rsqrt()[:, None] * components.T)).reshape(filters.shape))


def learning_rate(step: int, stage: Stage, recipe: Base) -> float:
    """Warm-up, plateau, linear decay to a twentieth."""
    decay = max(1.0, stage.steps * recipe.decay_fraction)
    return stage.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps, max(0.05, (stage.steps - step) / decay))


def stages(recipe: Base) -> list[str]:
    """The stages to run, in order: those from ``recipe.begin`` on."""
    names = list(STAGES)
    return names[names.index(recipe.begin) :]


def reopen(recipe: Base, model: str | Path, work: Path) -> None:
    """Make in `work` what stage ``recipe.begin`` begins with, from a finished `model`; nothing to do for the first stage, or twice.

    A finished model has lost its dense heads. They are trained anew over it, while it stays as it is. Raises AwaresError for a
    model of another architecture.
    """
    starts = [_checkpoint(work, stage) for stage in STAGES[recipe.begin]]
    if all(path.exists() for path in starts):
        return
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe.seed)
    network = Network(recipe, tokenizer, recipe.begin)
    weights = load_model(model).state_dict()
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in network.model.state_dict().items()}:
        raise AwaresError(
            f"{model}: not of the architecture that stage {recipe.begin} trains: set base.begin to glyphs"
        )
    network.model.load_state_dict(weights)
    heads = [v for k, v in network.parameters.items() if k.startswith("heads.")]
    optimiser = torch.optim.AdamW(heads, betas=(0.9, 0.98), weight_decay=0.0)
    batches = Batches(recipe, tokenizer, "vision", 0, HEAD_STEPS)
    for step, batch in enumerate(torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1)):
        rate = HEAD_RATE * min(1.0, (step + 1) / 10, max(0.05, 2 * (1 - step / HEAD_STEPS)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        network.dense.expect(batch)
        with torch.no_grad():
            network.model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        loss, _ = network.dense(batch, tuple(DENSE))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    state = {f"p.{k}": v.detach().contiguous() for k, v in network.parameters.items()}
    for path in starts:
        save_file(state, path)


def train(recipe: Base, work: Path, name: str, until: int | None = None, save_every: int = 100) -> None:
    """Train a stage from `work`'s newest checkpoint of it to step `until`; interruptible at any moment."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe.seed)
    stage = Stage.of(name, recipe)
    network = Network(recipe, tokenizer, name)
    if not _checkpoint(work, name).exists():
        network.begin(work)
    optimiser = _optimiser(network.parameters, recipe)
    step = _resume(_checkpoint(work, name), network.parameters, optimiser)
    stop = min(until or stage.steps, stage.steps)
    batches = Batches(recipe, tokenizer, name, step, stop)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4)
    started, seen = time.time(), []
    for batch in loader:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, stage, recipe)
        loss, parts = network.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        seen.append({k: float(v) for k, v in parts.items()})
        if step % 20 == 0 or step == stop:
            _log(work, name, step, seen, time.time() - started)
            started, seen = time.time(), []
        if step % save_every == 0 or step == stop:
            _save(_checkpoint(work, name), recipe, step, network.parameters, optimiser)


def _checkpoint(work: Path, stage: str) -> Path:
    return work / f"{stage}.safetensors"


def inputs(recipe: Base, model: str | Path) -> dict[str, Any]:
    """What determines the trained base model, as JSON values: the key of its checkpoint folder. ``model``: what a later ``begin`` goes on from."""
    values = {k: v for k, v in asdict(recipe).items() if k not in ("model", "dtype", "device")}
    vocabulary = hashlib.sha256(
        json.dumps(build_tokenizer(recipe.seed).get_vocab(), sort_keys=True).encode()
    ).hexdigest()
    start = "" if recipe.begin == next(iter(STAGES)) else training.folder_digest(model)
    code = training.code_of(__file__, *(str(part.__file__) for part in (base, lex, lookup, scenes)))
    about = {"stage": "base_model", "recipe": values, "begun_with": start, "code": code}
    return {**about, "words": WORDS, "vocabulary": vocabulary}


HISTORY = "training.json"  # beside the weights: stage, steps, how many were planned, hours; in the order of training


def history(log: pd.DataFrame, recipe: Base, model: str | Path) -> list[dict[str, Any]]:
    """What a model was trained with, stage by stage: the `log` of this run, after that of the `model` which it began from, if it did."""
    done = [] if recipe.begin == next(iter(STAGES)) else json.loads((Path(model) / HISTORY).read_text())
    for name in stages(recipe):
        part = log[log.stage == name]
        if len(part):
            hours = float((part.seconds * part.step.diff().fillna(part.step)).sum() / 3600)
            planned = Stage.of(name, recipe).steps
            done.append({"stage": name, "steps": int(part.step.iloc[-1]), "planned": planned, "hours": round(hours, 2)})
    return done


def write_card(folder: Path, recipe: Base, trained: list[dict[str, Any]], reading: pd.DataFrame) -> None:
    """The model card, README.md of `folder`, and what it was `trained` with: what it is, how it was trained, what it reads."""
    (folder / HISTORY).write_text(json.dumps(trained, indent=1) + "\n")
    hours = sum(one["hours"] for one in trained)
    spent = ", ".join(f"{one['steps']} of {one['planned']} {one['stage']} ({one['hours']:.1f} h)" for one in trained)
    again = (
        ""
        if recipe.begin == next(iter(STAGES))
        else f" Stage {recipe.begin} began from the weights as they were stored before it, with new dense heads."
    )
    notes = "".join(
        f"\n- {one['stage'].capitalize()}, {one['steps']} steps: {one['note']}" for one in trained if "note" in one
    )
    lines = "\n".join(f"| {r.view} | {r.evidence} | {r.accuracy:.1f} | {r.n} |" for r in reading.itertuples())
    config = json.loads((folder / "config.json").read_text())
    (folder / "README.md").write_text(f"""---
license: apache-2.0
library_name: transformers
---
# The embedded base model of awares

A `Qwen2_5_VLForConditionalGeneration` with {config["vision_config"]["depth"]} vision and {config["text_config"]["num_hidden_layers"]} language
layers, trained from scratch by `notebooks/00_base_model.ipynb` on scenes drawn by `awares.scenes`; no weights or data of anybody else. It reads
short printed words and numbers, sees coloured shapes and calls functions that its system message offers. It is a stand-in for a real VLM, so that the
whole method runs on a laptop, and good for nothing else: its world is the closed word list of `awares.lexicon`.

- Trained on CPU from seed {recipe.seed}; steps: {spent}; {hours:.1f} hours in all.{again}{notes}
- Stored in bfloat16; the pipeline loads it in float32.
- It has never seen the crop tool. As a VLM that grounds, it tells which part of a picture (a quadrant, the center, a half, all) holds something, also
  of print too small to read, where another function takes that as its argument; where the system message asks for it, and at times unasked, it says
  of such print, and of any that it would rather misread than read, that it is unclear. That there is a way to look, when that pays, and which
  part this tool wants, the cold start has to teach.

Validation rows of the embedded suite, percent right:

| view | evidence | accuracy | rows |
|---|---|---:|---:|
{lines}
""")


def export(work: Path, recipe: Base, folder: Path) -> int:
    """Write the newest checkpoint of `work` with both towers as a Hugging Face model in bfloat16, with processor; returns its step.

    Raises AwaresError where there is no checkpoint.
    """
    path = next((path for stage in reversed(PICTURED) if (path := _checkpoint(work, stage)).exists()), None)
    if path is None:
        raise AwaresError(f"{work} holds no checkpoint of the joint stage: run base training first")
    state = load_file(path)
    tokenizer = build_tokenizer(recipe.seed)
    network: Any = Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer))
    prefix = "p.model."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    lacking = network.load_state_dict(weights, strict=False).missing_keys
    if lacking:
        raise AwaresError(f"{path} lacks {len(lacking)} weights, such as {min(lacking)}: train again")
    save_model(network.to(torch.bfloat16), make_processor(tokenizer, min_pixels=TOKEN * TOKEN), folder)
    return int(state["t"])


def _log(work: Path, stage: str, step: int, seen: list[dict[str, float]], seconds: float) -> None:
    row: dict[str, Any] = {"stage": stage, "step": step, "seconds": round(seconds / len(seen), 3)} | {
        k: round(float(np.mean([s[k] for s in seen])), 4) for k in seen[0]
    }
    with open(work / "log.jsonl", "a") as log:
        log.write(json.dumps(row) + "\n")
    print(" ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def _optimiser(params: dict[str, torch.nn.Parameter], recipe: Base) -> torch.optim.Optimizer:
    """AdamW; matrices decay, embeddings, norms and biases do not."""
    decayed = {k for k, v in params.items() if v.ndim > 1 and "embed" not in k}
    groups = [
        {"params": [params[k] for k in params if k in decayed], "weight_decay": recipe.weight_decay},
        {"params": [params[k] for k in params if k not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))  # `train` sets the rate


def _save(
    path: Path, recipe: Base, step: int, params: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    """One safetensors file, replaced whole: weights, what the optimiser remembers, the step and the recipe."""
    state = {f"p.{k}": v.detach() for k, v in params.items()}
    for name, value in params.items():
        state |= {f"o.{name}|{k}": v for k, v in optimiser.state.get(value, {}).items()}
    state["t"] = torch.tensor(step)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in state.items()}, partial, {"recipe": json.dumps(asdict(recipe))})
    partial.replace(path)


def _resume(path: Path, params: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return 0
    state = load_file(path)
    if {k[2:] for k in state if k.startswith("p.")} != set(params):
        raise AwaresError(f"{path} belongs to another architecture; move it away or train in another folder")
    for name, value in params.items():
        value.data.copy_(state[f"p.{name}"])
        memory = {k.split("|")[1]: v for k, v in state.items() if k.startswith(f"o.{name}|")}
        if memory:
            optimiser.state[value] = memory
    return int(state["t"])
