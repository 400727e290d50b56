"""Batches for base training: token ids, labels, pixels, dense targets, and where each answer token should attend."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from architecture import IGNORE, LINKS, PATCH
from awares.engine.chat_format import TOOL_CALL
from awares.mini import vocabulary as lex
from examples import Example, Trail, View, example
from look_up import ROWS
from recipe import Recipe, Stage

MEAN, STD = (
    np.array(v, np.float32) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)
GROUP = 4  # batches drawn together
SPACE = "Ġ"  # how the tokenizer writes a space before a word


class Batches(torch.utils.data.IterableDataset):
    """Batch k depends on (seed, k) alone, so that a resumed run sees what an undisturbed one sees (but for `Network`'s blur of symbols)."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, stage: Stage, start: int, stop: int) -> None:
        self.recipe, self.tokenizer, self.stage, self.start, self.stop = recipe, tokenizer, stage, start, stop

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(self.start - self.start % GROUP, self.stop, GROUP):
            for offset, items in enumerate(self._group(step)):
                if self.start <= step + offset < self.stop:
                    yield collate(items, self.tokenizer)

    def _group(self, step: int) -> list[list[Example]]:
        """GROUP batches of equal work, drawn together and cut by length, so that little of a batch is padding."""
        rng = np.random.default_rng([self.recipe.seed, *self.stage.name.encode(), step])
        items: list[Example] = []
        while sum(_work(i, self.stage) for i in items) < GROUP * self.stage.work:
            items.append(example(rng, self.stage))
        items.sort(key=lambda i: _work(i, self.stage))
        ends = np.cumsum([_work(i, self.stage) for i in items])
        batches = [
            [i for i, e in zip(items, ends, strict=True) if b < e * GROUP / ends[-1] <= b + 1] for b in range(GROUP)
        ]
        return [
            batches[i] for i in rng.permutation(GROUP) if any(v for item in batches[i] for v in item.views)
        ] or batches


def _work(item: Example, stage: Stage) -> int:
    """Cost of an example in patches; a token of the language tower costs about as much as a patch of the vision tower."""
    seen = sum(v.words.size for v in item.views)
    read = sum(v.tokens for v in item.views) + 20 * len(item.turns) + len(item.system) // 3
    return {"language": read, "vision": seen, "both": seen + read}[stage.trains]


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
