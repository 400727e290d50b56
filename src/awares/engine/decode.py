"""Batched greedy decoding that can be continued: the layer under `rollout`.

`Decoder.start` runs rows side by side, left padded. `Decoder.extend` appends to some of those rows text and images that
the model did not write (the tool's answer) and goes on from the rows' old key-value cache: of the images only the new
ones pass through the vision tower, and of the tokens only the new ones through the language model (PAPER §1, turn 2).
"""

import os.path
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from awares.engine import chat_format
from awares.engine.model import ImageOnlyProcessor, visual_tokens
from awares.errors import AwaresValueError

Orders = list[int] | int | None  # of one row and turn: write these ids, or this many tokens, or what the model likes
Lap = Callable[[str, int], None]  # called with the phase (of `PHASES`) that has just ended, and its turn: 1 or 2
PHASES = ("preprocess", "vision", "prefill", "decode")
VISION_PATCHES = 4096  # 14 px patches encoded at a time, more only for a larger image: bounds memory, fits caches
SHARE_FROM = 256  # tokens that sharing a prefix must save: less costs more than the pass of its own that it takes


@dataclass
class State:
    """B rows of T positions after a generation; masked positions (padding, what follows an early end) are holes."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T), 1 = a real token
    types: Tensor  # (B, T), 1 = a visual token
    images: list[list[Image]]  # of each row, in order of appearance
    grids: list[Tensor]  # of each row: (images, 3), patches in time, height, width
    cache: DynamicCache  # T - 1 positions: the last token has not been fed
    positions: Tensor | None = None  # (3, B, T) where visual tokens are left out; None: the model computes them


@dataclass(frozen=True)
class Kept:
    """Visual tokens of a row after pruning: as the system's ratio counts them, and the mean over the LM's layers."""

    nominal: int
    layer_mean: float


@dataclass
class Output:
    """What one turn of B rows gave."""

    tokens: list[list[int]]  # generated ids of each row, up to and with the end-of-turn token
    first_logits: Tensor  # (B, vocabulary), of the first generated position, before any bias
    margins: list[float]  # of each row: the smallest gap between its two best logits; near 0 the choice is a float tie
    state: State
    kept: list[Kept] | None = None  # of each row, if the decoder prunes


class FirstToken(LogitsProcessor):
    """Keeps the logits of the first generated position and adds ``bias`` (B,) to ``token``'s there; notes every gap.

    A bias of -inf says that the row may not call; ``everywhere``, at no position.
    """

    def __init__(self, token: int, bias: Tensor, everywhere: bool = False) -> None:
        self.token = token
        self.bias = bias
        self.barred = torch.isneginf(bias) & everywhere
        self.logits: Tensor | None = None
        self.gaps: list[Tensor] = []  # of each step: (B,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.logits is None:
            self.logits = scores.float()
            scores = scores.clone()
            scores[:, self.token] += self.bias.to(scores)
        elif self.barred.any():
            scores = scores.clone()
            scores[self.barred.to(scores.device), self.token] = float("-inf")
        best = scores.topk(2, dim=-1).values.float()
        self.gaps.append(best[:, 0] - best[:, 1])
        return scores


class Ordered(LogitsProcessor):
    """Makes B rows write what ``orders`` say, at the price of writing it: for timing, and for models with random weights.

    A number orders that many tokens, the last of them the end of the turn. AwaresError for more than ``limit`` tokens.
    """

    def __init__(self, orders: Sequence[Orders], end: int, limit: int, device: Any) -> None:
        longest = max((order if isinstance(order, int) else len(order or ()) for order in orders), default=0)
        if longest > limit:
            raise AwaresValueError(f"{longest} tokens ordered, max_new_tokens is {limit}: raise it")
        must, open_ended = torch.full((len(orders), limit), -1), torch.zeros(len(orders), limit, dtype=torch.bool)
        for row, order in enumerate(orders):
            if isinstance(order, int):
                open_ended[row, : order - 1] = True
                must[row, order - 1] = end
            elif order:
                must[row, : len(order)] = torch.tensor(order)
        self.must, self.open_ended, self.end, self.step = must.to(device), open_ended.to(device), end, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        must, open_ended = self.must[:, self.step, None], self.open_ended[:, self.step, None]  # (B, 1)
        self.step += 1
        token = torch.arange(scores.shape[1], device=scores.device)
        barred = ((must >= 0) & (token != must)) | (open_ended & (token == self.end))
        # an ordered token counts 0: it may be one that the model is never let to write
        return scores.masked_fill(barred, float("-inf")).masked_fill(token == must, 0.0)


class PrefillEnd(LogitsProcessor):
    """Calls ``lap`` at the first step: what came before it was the prefill."""

    def __init__(self, lap: Callable[[], None]) -> None:
        self.lap, self.done = lap, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.done:
            self.lap()
        self.done = True
        return scores


class Codec:
    """Chat text <-> token ids: all of decoding that needs no model, for a model behind a server too.

    ``opening``: the text that every call begins with; the bias and the log-probability of a call are its first token's.
    """

    def __init__(self, processor: ImageOnlyProcessor, opening: str = chat_format.TOOL_CALL) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        spelling = self.tokenizer(opening, add_special_tokens=False)["input_ids"]
        self.call_token = spelling[0]
        self.call_only = len(spelling) == 1  # a token that opens calls and stands in no answer
        self.end = self.tokenizer.convert_tokens_to_ids(chat_format.END_OF_TURN)

    def tokenize(self, text: str, sizes: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Ids of rendered chat text; each image placeholder is repeated for all visual tokens of its size (w, h)."""
        pieces = text.split(self.processor.image_token)
        if len(pieces) != len(sizes) + 1:
            raise ValueError(f"{len(pieces) - 1} image placeholders for {len(sizes)} images")
        for index, size in enumerate(sizes):
            pieces[index] += self.processor.image_token * visual_tokens(size, self.processor)
        return self.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]

    def text(self, tokens: Sequence[int]) -> str:
        """Generated ids as text, control tokens kept."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Decoder(Codec):
    """Greedy decoding of a Qwen2.5-VL or Qwen3-VL ``model`` (a PEFT model counts with its adapter on).

    ``lap`` hears of the end of each phase, for timing: all that the host does before the model is ``preprocess``.
    """

    vision_patches: float = VISION_PATCHES  # 14 px patches that pass through the vision tower together
    shares_prefix = True  # whether `start` may pass what all rows begin with through the model once

    def __init__(
        self,
        model: Any,
        processor: ImageOnlyProcessor,
        max_new_tokens: int,
        lap: Lap | None = None,
        opening: str = chat_format.TOOL_CALL,
    ) -> None:
        super().__init__(processor, opening)
        self.lap = lap
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model  # LoRA layers stay in place
        self.max_new_tokens = max_new_tokens
        self.pad = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # a checkpoint's own generation settings must not leak in
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end,
            pad_token_id=self.pad,
            # a placeholder that the model writes itself would be taken for an image
            suppress_tokens=[processor.image_token_id, processor.video_token_id],
            return_dict_in_generate=True,
        )
        self.criteria = StoppingCriteriaList()  # shown (B, T) ids after every token; they may end rows
        self.processors = LogitsProcessorList()  # change (B, vocabulary) scores at every position

    @torch.no_grad()
    def start(
        self,
        rows: Sequence[list[int]],
        images: Sequence[list[Image]],
        call_bias: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        orders: Sequence[Orders] | None = None,
    ) -> Output:
        """Generate from B rows of ids (images expanded) and their images, in the order of their placeholders.

        What all rows begin with, up to the first image, passes through the language model once (the system prompt).
        ``names``: the rows' ids, for a decoder that draws by row.
        """
        features, grids = self._encode(images, 1)
        shared = self._shared(rows) if self.shares_prefix else 0
        ids, mask, types = self._pad([row[shared:] for row in rows])
        cache = DynamicCache(config=self.model.config)
        if shared:
            prefix = torch.tensor([rows[0][:shared]], device=ids.device)
            cache = prefix_cache(self.model, prefix, len(rows))
            ids = torch.cat([prefix.expand(len(rows), -1), ids], dim=1)
            mask = torch.cat([mask.new_ones(len(rows), shared), mask], dim=1)
            types = torch.cat([types.new_zeros(len(rows), shared), types], dim=1)
        return self._generate(
            State(ids, mask, types, [list(row) for row in images], grids, cache), features, call_bias, orders
        )

    @torch.no_grad()
    def extend(
        self,
        state: State,
        picked: Sequence[int],
        suffixes: Sequence[list[int]],
        images: Sequence[list[Image]],
        reuse: bool = True,
        orders: Sequence[Orders] | None = None,
    ) -> Output:
        """Append ``suffixes`` (ids) and new ``images`` to the rows ``picked`` of ``state`` and generate; they may not call again.

        ``reuse=False`` prefills the same ids from nothing, all images encoded again: the reference for reuse.
        """
        rows = torch.tensor(picked, device=state.ids.device)
        barred = [float("-inf")] * len(picked)
        kept = [[*state.images[row], *new] for row, new in zip(picked, images, strict=True)]
        if not reuse:
            sequences = [state.ids[row][state.mask[row].bool()].tolist() for row in picked]
            ids, mask, types = self._pad([old + new for old, new in zip(sequences, suffixes, strict=True)])
            features, grids = self._encode(kept, 2)
            fresh = State(ids, mask, types, kept, grids, DynamicCache(config=self.model.config))
            return self._generate(fresh, features, barred, orders, 2)
        ids, mask, types = self._pad(suffixes)
        features, new_grids = self._encode(images, 2)
        grids = [torch.cat([state.grids[row], new]) for row, new in zip(picked, new_grids, strict=True)]
        longer = State(
            torch.cat([state.ids[rows], ids], dim=1),
            torch.cat([state.mask[rows], mask], dim=1),
            torch.cat([state.types[rows], types], dim=1),
            kept,
            grids,
            _select(state.cache, rows),
        )
        return self._generate(longer, features, barred, orders, 2)

    def _generate(
        self,
        state: State,
        features: list[Tensor],
        call_bias: Sequence[float] | None,
        orders: Sequence[Orders] | None = None,
        turn: int = 1,
    ) -> Output:
        """Feed what ``state.cache`` does not hold yet, then decode until every row has ended its turn."""
        known = state.ids.shape[1]
        bias = torch.tensor([0.0] * len(state.ids) if call_bias is None else list(call_bias))
        first = FirstToken(self.call_token, bias, self.call_only)
        steps: list[LogitsProcessor] = [PrefillEnd(lambda: self._lap("prefill", turn)), first]
        if orders and any(order is not None for order in orders):
            steps.append(Ordered(orders, self.end, self.max_new_tokens, state.ids.device))
        # rope_deltas is left on the model by the last call and would be taken for this batch's
        self.model.model.rope_deltas = None
        inputs: dict[str, Any] = {"mm_token_type_ids": state.types}
        if state.positions is not None:
            inputs = {"position_ids": state.positions}
        elif any(len(grid) for grid in state.grids):
            inputs["image_grid_thw"] = torch.cat(state.grids)  # of old images too: positions need them
        if features:
            inputs["mm_encoder_outputs"] = {"image": _encoded(features, self.model.config.text_config.hidden_size)}
        result = self.model.generate(
            input_ids=state.ids,
            attention_mask=state.mask,
            past_key_values=state.cache,
            generation_config=self.config,
            logits_processor=LogitsProcessorList([*steps, *self.processors]),
            stopping_criteria=self.criteria,
            **inputs,
        )
        self.model.model.rope_deltas = None
        self._lap("decode", turn)
        return self._output(result.sequences, known, state, result.past_key_values, first)

    def _output(self, ids: Tensor, known: int, state: State, cache: DynamicCache, first: FirstToken) -> Output:
        assert first.logits is not None
        written = ids[:, known:]
        ended = (written == self.end).int().cumsum(dim=1) - (written == self.end).int()  # ends before each position
        fresh = (ended == 0).to(state.mask)
        tokens = [row[keep.bool()].tolist() for row, keep in zip(written, fresh, strict=True)]
        gaps = torch.stack(first.gaps, dim=1).masked_fill(fresh == 0, float("inf"))
        mask = torch.cat([state.mask, fresh], dim=1)
        types = torch.cat([state.types, torch.zeros_like(fresh)], dim=1)
        longer = State(ids, mask, types, state.images, state.grids, cache)
        return Output(tokens, first.logits, gaps.amin(dim=1).tolist(), longer)

    def _lap(self, phase: str, turn: int) -> None:
        if self.lap:
            self.lap(phase, turn)

    def _shared(self, rows: Sequence[list[int]]) -> int:
        """How many ids all ``rows`` begin with, none of them an image's and not a whole row; 0 where it saves little."""
        common = os.path.commonprefix(list(rows))
        if self.processor.image_token_id in common:
            common = common[: common.index(self.processor.image_token_id)]
        shared = min(len(common), min(map(len, rows)) - 1)
        return shared if shared * (len(rows) - 1) >= SHARE_FROM else 0

    def _pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and type ids of B rows, left padded, each (B, longest)."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        return ids, mask, (ids == self.processor.image_token_id).to(mask.dtype)

    def _encode(self, images: Sequence[list[Image]], turn: int = 1) -> tuple[list[Tensor], list[Tensor]]:
        """Vision features of every image, in order, each (visual tokens, width); and every row's grids (images, 3).

        Qwen3-VL's tower feeds several layers of the language model: what they get stands behind it, (visual tokens, (1 + layers) * width).
        """
        flat = [image for row in images for image in row]
        if not flat:
            self._lap("preprocess", turn)
            return [], [torch.zeros(len(row), 3, dtype=torch.long, device=self.model.device) for row in images]
        pixels = self.processor.image_processor(flat, return_tensors="pt").to(self.model.device)
        self._lap("preprocess", turn)
        grids, features = pixels["image_grid_thw"], []
        for patches, part in _portions(pixels["pixel_values"], grids, self.vision_patches):
            found = self.model.get_image_features(patches, part)
            deep = getattr(found, "deepstack_features", None) or []
            features += [torch.cat([one, *more], dim=-1) for one, *more in zip(found.pooler_output, *deep, strict=True)]
        self._lap("vision", turn)
        return features, list(grids.split([len(row) for row in images]))


def prefix_cache(model: Any, prefix: Tensor, rows: int) -> DynamicCache:
    """The cache of text ids (1, P), seen by ``rows`` rows. At the start of a row text has the same positions in all.

    Gradients pass through it where they are on.
    """
    cache = DynamicCache(config=model.config)
    model.model.language_model(input_ids=prefix, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return DynamicCache(
        [(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)) for layer in layers]
    )


def vision_output(pooled: Any, deep: Sequence[Any]) -> BaseModelOutputWithPooling:
    """What a vision tower says: ``pooled`` for the language model's input, and for its first layers ``deep`` (Qwen3-VL's; else none)."""
    if deep:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=list(deep))
    return BaseModelOutputWithPooling(pooler_output=pooled)


def _encoded(features: Sequence[Tensor], width: int) -> Any:
    """The features of `Decoder._encode` as the model takes them."""
    parts = [one.split(width, dim=-1) for one in features]
    pooled, *deep = ([part[level] for part in parts] for level in range(len(parts[0])))
    return vision_output(tuple(pooled), deep)


def _portions(patches: Tensor, grids: Tensor, limit: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole images, as many at a time as stay within ``limit``: the patches of each and its grids."""
    counts = grids.prod(dim=1).tolist()
    begin = 0
    for index, together in enumerate(accumulate(counts)):
        if index + 1 == len(counts) or together - sum(counts[:begin]) + counts[index + 1] > limit:
            first = sum(counts[:begin])
            yield patches[first:together], grids[begin : index + 1]
            begin = index + 1


def _select(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A copy of the cache that holds only ``rows``, in their order; the old one stays as it was."""
    layers: list[Any] = cache.layers
    return DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in layers])
