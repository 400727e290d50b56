"""Batches of base training: token ids, labels, pixels, dense targets, and where each answer token should attend."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from awares.engine.chat_format import TOOL_CALL
from awares.mini import vocabulary as lex
from examples import Example, example
from recipe import Recipe, Stage
from targets import IGNORE, PATCH, ROWS, TOKEN, Tensors, Trail

MEAN, STD = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]], np.float32)
GROUP = 4  # batches drawn together
SPACE = "Ġ"  # how the tokenizer writes a space before a word
JOINING = ("and", f"{SPACE}and")  # between the two parts of an answer


class Batches(torch.utils.data.IterableDataset):
    """Batch k depends on (seed, k) alone, so a resumed run sees the same batches."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, stage: Stage, start: int, stop: int) -> None:
        self.recipe, self.tokenizer, self.stage, self.start, self.stop = recipe, tokenizer, stage, start, stop

    def __iter__(self) -> Iterator[Tensors]:
        for step in range(self.start - self.start % GROUP, self.stop, GROUP):
            for offset, items in enumerate(self._group(step)):
                if self.start <= step + offset < self.stop:
                    yield collate(items, self.tokenizer)

    def _group(self, step: int) -> list[list[Example]]:
        """GROUP batches of equal work, drawn together and cut by length, so that little of a batch is padding."""
        rng = np.random.default_rng([self.recipe.seed, *self.stage.name.encode(), step])
        drawn: list[tuple[int, Example]] = []
        while sum(work for work, _ in drawn) < GROUP * self.stage.work:
            item = example(rng, self.stage)
            drawn.append((self._work(item), item))
        drawn.sort(key=lambda pair: pair[0])
        ends = np.cumsum([work for work, _ in drawn])
        batches: list[list[Example]] = [[] for _ in range(GROUP)]
        for (_, item), place in zip(drawn, np.ceil(ends * GROUP / ends[-1]).astype(int) - 1, strict=True):
            batches[place].append(item)
        shuffled = [batches[i] for i in rng.permutation(GROUP)]
        return [batch for batch in shuffled if any(item.views for item in batch)] or batches

    def _work(self, item: Example) -> int:
        """Cost of an example in patches; a token of the language tower costs about as much as a patch."""
        seen = sum(v.words.size for v in item.views)
        read = seen // 4 + 20 * len(item.turns) + len(item.system) // 3
        return {"language": read, "vision": seen, "both": seen + read}[self.stage.trains]


def collate(items: list[Example], tokenizer: PreTrainedTokenizerFast) -> Tensors:
    """A batch of B conversations, right-padded to T tokens, with P patches in all.

    input_ids, labels, attention_mask, called (answers after a call), candid (numbers of answers to doubt): (B, T).
    pixel_values (P, 1176), words and traits (P,), glyphs (P, 4), links (P, LINKS); leads (N, 4): picture, link, and two
    patches. watch_*: see `Watch.expect`; one for each answer token that is looked up, from the token before it.
    """
    encoded = [encode(item, tokenizer) for item in items]
    ids = _padded([ids for ids, _ in encoded], tokenizer.pad_token_id)
    labels = _padded([labels for _, labels in encoded], IGNORE)
    pad: Any = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    views = [v for item in items for v in item.views]
    marks = [_marks(item, row, i * ids.shape[1]) for i, (item, row) in enumerate(zip(items, labels, strict=True))]
    leads = [(picture, *lead) for picture, one in enumerate(views) for lead in one.leads]
    found = [look for row, item in enumerate(items) for look in _look_ups(row, item, ids[row], labels[row], tokenizer)]
    watched = {f"watch_{name}": torch.stack([look[name] for look in found]) for name in (found[0] if found else ())}
    grids = {name: [getattr(v, name) for v in views] for name in ("words", "traits", "glyphs", "links")}
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": _padded([[1] * len(row) for row, _ in encoded], 0),
        "called": torch.stack([called for called, _ in marks]),
        "candid": torch.stack([candid for _, candid in marks]),
        "mm_token_type_ids": torch.eq(ids, pad).long(),
        "pixel_values": torch.from_numpy(np.concatenate([patchify(np.asarray(v.image)) for v in views])),
        "image_grid_thw": torch.tensor([[1, *v.grid] for v in views]),
        "leads": torch.tensor(leads, dtype=torch.long).reshape(-1, 4),
        **{name: torch.from_numpy(np.concatenate(parts)) for name, parts in grids.items()},
        **watched,
    }


def encode(item: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids and labels (assistant tokens only) of a conversation, as the chat template writes it."""
    pads = [f"<|vision_start|>{'<|image_pad|>' * (v.words.size // 4)}<|vision_end|>" for v in item.views]
    shown = {0: pads} if item.late == 0 else {0: pads[:1], item.late: pads[1:]}
    pieces = [(f"<|im_start|>system\n{item.system}<|im_end|>\n", False)]
    for index, (question, answer) in enumerate(item.turns):
        user = "".join(shown.get(index, [])) + question
        if item.call and index == item.late:
            first = pads[0] if index == 0 else ""
            pieces.append((f"{_user_turn(first + question)}{item.call}<|im_end|>\n", False))
            user = f"<tool_response>\n{''.join(pads[1:])}\n</tool_response>"
        pieces += [(_user_turn(user), False), (f"{answer}<|im_end|>", True), ("\n", False)]
    if not item.turns:
        pieces.append((f"<|im_start|>user\n{''.join(pads)}", False))
    tokens = [(tokenizer(text, add_special_tokens=False)["input_ids"], learned) for text, learned in pieces]
    labels = [token if learned else IGNORE for ids, learned in tokens for token in ids]
    return [token for ids, _ in tokens for token in ids], labels


def patchify(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (patches, 3·2·14·14), equal to the output of Qwen2VLImageProcessor."""
    pixels = (image.astype(np.float32) / 255 - MEAN) / STD
    rows, columns = pixels.shape[0] // TOKEN, pixels.shape[1] // TOKEN
    grid = pixels.reshape(rows, 2, PATCH, columns, 2, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.repeat(grid[:, :, :, :, :, None], 2, axis=5).reshape(4 * rows * columns, -1)


def _user_turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def _padded(rows: list[list[int]], value: Any) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _begins(labels: Tensor) -> Tensor:
    """(T,): whether a token is the first of an answer; the first token of a conversation never is."""
    learned = torch.ne(labels, IGNORE)
    return learned & ~learned.roll(1)


def _marks(item: Example, labels: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Of each token (T,): whether it answers after the call; a number above ``offset`` for an answer to doubt, or 0."""
    turn = _begins(labels).cumsum(0) * torch.ne(labels, IGNORE)  # from 1
    legible = torch.tensor([False, *(item.candid and answer != lex.UNREAD for _, answer in item.turns)])
    return (turn == item.late + 1) & bool(item.call), (turn + offset) * legible[turn]


def _look_ups(i: int, item: Example, ids: Tensor, labels: Tensor, tokenizer: Any) -> Iterator[Tensors]:
    """Targets of conversation ``i`` of a batch for the attention of each token that is looked up."""
    words = [str(word) for word in tokenizer.convert_ids_to_tokens(ids.tolist())]
    bare = [word.removeprefix(SPACE) for word in words]
    pads, openings, ends = (
        [place for place, word in enumerate(words) if word == token]
        for token in ("<|image_pad|>", "<|im_start|>", "<|im_end|>")
    )
    tokens = [(index, token) for index, view in enumerate(item.views) for token in range(view.words.size // 4)]
    pad_of = dict(zip(tokens, pads, strict=True))
    begins = _begins(labels).nonzero()[:, 0].tolist()
    for turn, (begin, path) in enumerate(zip(begins, item.trails, strict=False)):
        back = 4 if item.call and turn == item.late else 2  # call and result lie between question and answer
        question, reply = [place for place in openings if place < begin][-back:][:2]
        end = next(place for place in ends if place >= begin)
        if item.turns[turn][1].startswith(TOOL_CALL):  # the argument of the call is what is looked up
            begin = next(at for at in range(begin, end) if words[at].endswith('["')) + 1
            end = next(at for at in range(begin, end) if words[at].startswith('"]'))
        for position, part, places in _read_off(path, words, begin, end):
            shown = [(patch % 4 // 2, pad_of[view, patch // 4]) for view, patch in places]
            earlier = [(row, pad) for row, pad in shown if pad < position]
            if shown and not earlier:
                continue
            evidence = torch.zeros(ROWS, len(ids), dtype=torch.bool)
            for row, pad in earlier:
                evidence[row, pad] = True
            if path.places:
                evidence[~evidence.any(1), 0] = True  # heads of a row that shows nothing attend to the first token
            names = path.subjects[min(part, len(path.subjects) - 1)]
            named = [word in names or word.removesuffix("s") in names for word in bare]
            subject = [question <= place < reply and is_name for place, is_name in enumerate(named)]
            look = {"rows": i, "positions": position - 1, "subject": subject, "evidence": evidence}
            yield {name: torch.as_tensor(value) for name, value in look.items()}


def _read_off(path: Trail, words: list[str], begin: int, end: int) -> Iterator[tuple[int, int, frozenset]]:
    """(position, part, places) of the tokens of printed words, without the `and` between two parts."""
    part, word = 0, 0
    for position in range(begin, end):
        more = part + 1 < len(path.places)
        joining = more and words[position] in JOINING
        if more and position > begin and words[position - 1] in JOINING:
            part, word = part + 1, 0
        elif path.by_word and position > begin and words[position].startswith(SPACE) and not joining:
            word += 1
        if not joining and not path.places:
            yield position, part, frozenset()
        elif not joining and word < len(path.places[part]):
            yield position, part, path.places[part][word]
