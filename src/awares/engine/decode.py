"""Batched greedy decoding, and how rows are grouped. The second turn reuses the cache of the first (PAPER §1)."""

import os.path
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPooling

from awares.engine.chat_format import END_OF_TEXT, END_OF_TURN, TOOL_CALL
from awares.engine.model import ImageOnlyProcessor, visual_tokens

VISION_PATCHES = 4096  # of 14 px encoded at a time (more only for a single larger image): bounds memory, fits caches
_Rows = Sequence[list[int]]
_Images = Sequence[list[Image]]
WINDOW, WINDOW_PIXELS = 256, 2**28  # rows open at a time, and pixels of their images: 0.8 GB
SHARE_FROM = 256  # tokens that a shared prefix must save: below that, its extra forward pass costs more


@dataclass
class State:
    """B rows of T positions after a generation; masked positions (padding, positions after an early end) are holes."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T), 1 = a real token
    types: Tensor  # (B, T), 1 = a visual token
    images: list[list[Image]]  # per row, in order of appearance
    grids: list[Tensor]  # per row: (images, 3), patches in time, height, width
    cache: DynamicCache  # T - 1 positions: the last token has not been fed
    positions: Tensor | None = None  # (3, B, T) if visual tokens are left out; None: the model computes them


class Kept(NamedTuple):
    """Visual tokens of a row after pruning: the count that the system reports, and the mean over the LM's layers."""

    nominal: int
    layer_mean: float


@dataclass
class Output:
    """One generated turn of B rows."""

    tokens: list[list[int]]  # per row: generated ids, up to and with the end-of-turn token
    first_logits: Tensor  # (B, vocabulary) of the first generated position, before any bias
    margins: list[float]  # per row: smallest gap between the two best logits; near 0 the choice is a float tie
    state: State
    kept: list[Kept] | None = None  # per row, if the decoder prunes


class FirstToken(LogitsProcessor):
    """Records the first position's logits, then adds ``bias`` (B,) to ``token``'s; records all positions' gaps.

    A row with bias -inf cannot write ``token`` at the first position, with ``everywhere`` at no position.
    """

    def __init__(self, token: int, bias: Tensor, everywhere: bool = False) -> None:
        self.token, self.bias = token, bias
        self.barred = torch.isneginf(bias) & everywhere
        self.logits: Tensor | None = None
        self.gaps: list[Tensor] = []  # per step: (B,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bias = torch.where(self.barred, self.bias, 0.0)
        if self.logits is None:
            self.logits, bias = scores.float(), self.bias
        scores = scores.clone()
        scores[:, self.token] += bias.to(scores)
        best = scores.topk(2, dim=-1).values.float()
        self.gaps.append(best[:, 0] - best[:, 1])
        return scores


class Codec:
    """Chat text <-> token ids without a model; the first token of ``opening`` begins every call and has its bias."""

    def __init__(self, processor: ImageOnlyProcessor, opening: str = TOOL_CALL) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        spelling = self.tokenizer(opening, add_special_tokens=False)["input_ids"]
        self.call_token = spelling[0]
        self.call_only = len(spelling) == 1  # this token opens calls and occurs in no answer
        self.end = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)

    def tokenize(self, text: str, sizes: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Ids of rendered chat text; each image placeholder is repeated for all visual tokens of its size (w, h)."""
        pieces = text.split(self.processor.image_token)
        assert len(pieces) == len(sizes) + 1, f"{len(pieces) - 1} image placeholders for {len(sizes)} images"
        for index, size in enumerate(sizes):
            pieces[index] += self.processor.image_token * visual_tokens(size, self.processor)
        return self.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Decoder(Codec):
    """Greedy decoding of a Qwen2.5-VL or Qwen3-VL ``model`` (a PEFT model decodes with its adapter)."""

    vision_patches: float = VISION_PATCHES
    shares_prefix = True  # whether `start` may pass the common prefix of all rows through the model once

    def __init__(
        self, model: Any, processor: ImageOnlyProcessor, max_new_tokens: int, opening: str = TOOL_CALL
    ) -> None:
        super().__init__(processor, opening)
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model  # LoRA layers stay in place
        self.max_new_tokens = max_new_tokens
        self.pad = self.tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        # All are set: a checkpoint's own generation settings must not leak in
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        options |= {"max_new_tokens": max_new_tokens, "eos_token_id": self.end, "pad_token_id": self.pad}
        placeholders = [processor.image_token_id, processor.video_token_id]  # the model would take them for images
        self.config = GenerationConfig(**options, suppress_tokens=placeholders, return_dict_in_generate=True)
        self.criteria = StoppingCriteriaList()  # see (B, T) ids after every token and may end rows
        self.processors = LogitsProcessorList()  # change (B, vocabulary) scores at every position

    @torch.no_grad()
    def start(self, rows: _Rows, images: _Images, call_bias: Any = None, names: Any = None) -> Output:
        """Generate from B rows of ids (images expanded), left padded, and their images in the order of placeholders.

        The common prefix of all rows up to the first image (the system prompt) passes through the language model once.
        ``call_bias``: a float a row, added to the call's logit. ``names``: the rows' ids.
        """
        self.names = list(names or map(str, range(len(rows))))
        features, grids = self._encode(images)
        common = os.path.commonprefix(list(rows)) if self.shares_prefix else []
        if self.processor.image_token_id in common:
            common = common[: common.index(self.processor.image_token_id)]
        shared = min(len(common), min(map(len, rows)) - 1)
        shared = shared if shared * (len(rows) - 1) >= SHARE_FROM else 0
        ids, mask, types = self._pad([row[shared:] for row in rows])
        cache = DynamicCache(config=self.model.config)
        if shared:
            prefix = torch.tensor([rows[0][:shared]], device=ids.device)
            cache = prefix_cache(self.model, prefix, len(rows))
            ids = torch.cat([prefix.expand(len(rows), -1), ids], dim=1)
            mask, types = pad(mask, (shared, 0), value=1), pad(types, (shared, 0))
        return self._generate(State(ids, mask, types, [list(row) for row in images], grids, cache), features, call_bias)

    @torch.no_grad()
    def extend(
        self, state: State, picked: Sequence[int], suffixes: _Rows, images: _Images, reuse: bool = True
    ) -> Output:
        """Append ``suffixes`` (ids), ``images`` to rows ``picked``, generate without calls; ``reuse`` their cache."""
        rows = torch.tensor(picked, device=state.ids.device)
        barred = [float("-inf")] * len(picked)
        seen = [[*state.images[row], *new] for row, new in zip(picked, images, strict=True)]
        if not reuse:
            sequences = [state.ids[row][state.mask[row].bool()].tolist() for row in picked]
            padded = self._pad([old + new for old, new in zip(sequences, suffixes, strict=True)])
            features, grids = self._encode(seen)
            return self._generate(State(*padded, seen, grids, DynamicCache(config=self.model.config)), features, barred)
        old = state.ids[rows], state.mask[rows], state.types[rows]
        ids, mask, types = (torch.cat(parts, dim=1) for parts in zip(old, self._pad(suffixes), strict=True))
        features, grids = self._encode(images)
        grids = [torch.cat([state.grids[row], new]) for row, new in zip(picked, grids, strict=True)]
        layers: list[Any] = state.cache.layers
        cache = DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in layers])  # a copy
        return self._generate(State(ids, mask, types, seen, grids, cache), features, barred)

    def _generate(self, state: State, features: list[Tensor], call_bias: Sequence[float] | None) -> Output:
        """Feed the positions that ``state.cache`` lacks, then decode until every row has ended its turn."""
        bias = torch.tensor([0.0] * len(state.ids) if call_bias is None else list(call_bias))
        first = FirstToken(self.call_token, bias, self.call_only)
        self.model.model.rope_deltas = None  # the last call left it on the model
        inputs: dict[str, Any] = {"mm_token_type_ids": state.types}
        if state.positions is not None:
            inputs = {"position_ids": state.positions}
        elif any(len(grid) for grid in state.grids):
            inputs["image_grid_thw"] = torch.cat(state.grids)  # old images too: positions need them
        if features:
            width = self.model.config.text_config.hidden_size
            pooled, *deep = zip(*(one.split(width, dim=-1) for one in features), strict=True)
            inputs["mm_encoder_outputs"] = {"image": vision_output(pooled, deep)}
        inputs |= {"input_ids": state.ids, "attention_mask": state.mask, "past_key_values": state.cache}
        inputs |= {"logits_processor": LogitsProcessorList([first, *self.processors])}
        result = self.model.generate(**inputs, generation_config=self.config, stopping_criteria=self.criteria)
        self.model.model.rope_deltas = None
        written = result.sequences[:, state.ids.shape[1] :]
        ended = (written == self.end).int().cumsum(dim=1) - (written == self.end).int()  # ends before each position
        fresh = (ended == 0).to(state.mask)
        tokens = [row[keep.bool()].tolist() for row, keep in zip(written, fresh, strict=True)]
        gaps = torch.stack(first.gaps, dim=1).masked_fill(fresh == 0, float("inf"))
        mask = torch.cat([state.mask, fresh], dim=1)
        types = pad(state.types, (0, fresh.shape[1]))
        longer = State(result.sequences, mask, types, state.images, state.grids, result.past_key_values)
        assert first.logits is not None
        return Output(tokens, first.logits, gaps.amin(dim=1).tolist(), longer)

    def _pad(self, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and type ids of B rows, left padded, each (B, longest)."""
        longest, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        return ids, mask, (ids == self.processor.image_token_id).to(mask.dtype)

    def _encode(self, images: _Images) -> tuple[list[Tensor], list[Tensor]]:
        """Features (visual tokens, width; Qwen3-VL: times 1 + layers) of every image, every row's grids (images, 3)."""
        if not any(images):
            return [], [torch.zeros(0, 3, dtype=torch.long, device=self.model.device) for _ in images]
        pixels = self._pixels([image for row in images for image in row])
        grids, features, begin, first = pixels["image_grid_thw"], [], 0, 0
        counts = grids.prod(dim=1).tolist()
        for end, last in enumerate(accumulate(counts), start=1):  # whole images, at most ``vision_patches`` at a time
            if end < len(counts) and last - first + counts[end] <= self.vision_patches:
                continue
            found = self.model.get_image_features(pixels["pixel_values"][first:last], grids[begin:end])
            deep = getattr(found, "deepstack_features", None) or []
            features += [torch.cat([one, *more], dim=-1) for one, *more in zip(found.pooler_output, *deep, strict=True)]
            begin, first = end, last
        return features, list(grids.split([len(row) for row in images]))

    def _pixels(self, images: list[Image]) -> Any:
        return self.processor.image_processor(images, return_tensors="pt").to(self.model.device)


def call_scores(logits: Tensor, token: int) -> tuple[list[float], list[float]]:
    """Per row of ``logits`` (B, vocabulary): log-probability of ``token``, and its logit minus the best other one."""
    logprobs = torch.log_softmax(logits, dim=-1)[:, token]
    others = logits.clone()
    others[:, token] = float("-inf")
    return logprobs.tolist(), (logits[:, token] - others.amax(dim=-1)).tolist()


def prefix_cache(model: Any, prefix: Tensor, rows: int) -> DynamicCache:
    """The cache of text ids (1, P) at the start of ``rows`` rows; gradients pass through it if they are enabled."""
    cache = DynamicCache(config=model.config)
    model.model.language_model(input_ids=prefix, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return DynamicCache([tuple(one.expand(rows, -1, -1, -1) for one in (each.keys, each.values)) for each in layers])


def vision_output(pooled: Any, deep: Sequence[Any]) -> BaseModelOutputWithPooling:
    """A vision tower's output: ``pooled`` for the language model's input, ``deep`` for its first layers (Qwen3-VL)."""
    if deep:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=list(deep))
    return BaseModelOutputWithPooling(pooler_output=pooled)


def windows(rows: Iterable[Any], pixels: Callable[[Any], int]) -> Iterator[list[Any]]:
    """``rows`` in parts of at most WINDOW rows that end once their images have WINDOW_PIXELS pixels."""
    part: list[Any] = []
    total = 0
    for row in rows:
        part.append(row)
        total += pixels(row)
        if len(part) >= WINDOW or total >= WINDOW_PIXELS:
            yield part
            part, total = [], 0
    if part:
        yield part


def token_groups(lengths: Sequence[int], room: int, budget: int) -> Iterator[list[int]]:
    """Consecutive indices of ``lengths`` whose padded size, with ``room`` for answers, is within ``budget`` tokens."""
    begin = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (max(lengths[begin : end + 1]) + room) * (end + 1 - begin) > budget:
            yield list(range(begin, end))
            begin = end
