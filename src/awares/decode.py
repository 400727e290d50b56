"""Batched greedy decoding that can be continued: the layer under `rollout`.

`Decoder.start` runs rows side by side, left padded. `Decoder.extend` appends to some of those rows text and images that
the model did not write (the tool's answer) and goes on from the rows' old key-value cache: of the images only the new
ones pass through the vision tower, and of the tokens only the new ones through the language model (PAPER §1, turn 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
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

from awares import protocol
from awares.model import ImageOnlyProcessor, visual_tokens


@dataclass
class State:
    """B rows of T positions after a generation; masked positions (padding, what follows an early end) are holes."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T), 1 = a real token
    types: Tensor  # (B, T), 1 = a visual token
    images: list[list[Image]]  # of each row, in order of appearance
    grids: list[Tensor]  # of each row: (images, 3), patches in time, height, width
    cache: DynamicCache  # T - 1 positions: the last token has not been fed


@dataclass
class Output:
    """What one turn of B rows gave."""

    tokens: list[list[int]]  # generated ids of each row, up to and with the end-of-turn token
    first_logits: Tensor  # (B, vocabulary), of the first generated position, before any bias
    margins: list[float]  # of each row: the smallest gap between its two best logits; near 0 the choice is a float tie
    state: State


class FirstToken(LogitsProcessor):
    """Keeps the logits of the first generated position and adds ``bias`` (B,) to ``token``'s there; notes every gap."""

    def __init__(self, token: int, bias: Tensor) -> None:
        self.token = token
        self.bias = bias
        self.logits: Tensor | None = None
        self.gaps: list[Tensor] = []  # of each step: (B,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.logits is None:
            self.logits = scores.float()
            scores = scores.clone()
            scores[:, self.token] += self.bias.to(scores)
        best = scores.topk(2, dim=-1).values.float()
        self.gaps.append(best[:, 0] - best[:, 1])
        return scores


class Decoder:
    """Greedy decoding of a Qwen2.5-VL ``model`` (a PEFT model counts with its adapter on)."""

    def __init__(self, model: Any, processor: ImageOnlyProcessor, max_new_tokens: int) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model  # LoRA layers stay in place
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_new_tokens = max_new_tokens
        self.call_token = self.tokenizer.convert_tokens_to_ids(protocol.TOOL_CALL)
        self.end = self.tokenizer.convert_tokens_to_ids(protocol.END_OF_TURN)
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

    @torch.no_grad()
    def start(
        self, rows: Sequence[list[int]], images: Sequence[list[Image]], call_bias: Sequence[float] | None = None
    ) -> Output:
        """Generate from B rows of ids (images expanded) and their images, in the order of their placeholders."""
        ids, mask, types = self._pad(rows)
        features, grids = self._encode(images)
        state = State(ids, mask, types, [list(row) for row in images], grids, DynamicCache(config=self.model.config))
        return self._generate(state, features, call_bias)

    @torch.no_grad()
    def extend(
        self,
        state: State,
        picked: Sequence[int],
        suffixes: Sequence[list[int]],
        images: Sequence[list[Image]],
        reuse: bool = True,
    ) -> Output:
        """Append ``suffixes`` (ids) and new ``images`` to the rows ``picked`` of ``state`` and generate.

        ``reuse=False`` prefills the same ids from nothing, all images encoded again: the reference for reuse.
        """
        rows = torch.tensor(picked, device=state.ids.device)
        kept = [[*state.images[row], *new] for row, new in zip(picked, images, strict=True)]
        if not reuse:
            sequences = [state.ids[row][state.mask[row].bool()].tolist() for row in picked]
            return self.start([old + new for old, new in zip(sequences, suffixes, strict=True)], kept)
        ids, mask, types = self._pad(suffixes)
        features, new_grids = self._encode(images)
        grids = [torch.cat([state.grids[row], new]) for row, new in zip(picked, new_grids, strict=True)]
        longer = State(
            torch.cat([state.ids[rows], ids], dim=1),
            torch.cat([state.mask[rows], mask], dim=1),
            torch.cat([state.types[rows], types], dim=1),
            kept,
            grids,
            _select(state.cache, rows),
        )
        return self._generate(longer, features, None)

    def _generate(self, state: State, features: list[Tensor], call_bias: Sequence[float] | None) -> Output:
        """Feed what ``state.cache`` does not hold yet, then decode until every row has ended its turn."""
        known = state.ids.shape[1]
        bias = torch.tensor([0.0] * len(state.ids) if call_bias is None else list(call_bias))
        first = FirstToken(self.call_token, bias)
        # rope_deltas is left on the model by the last call and would be taken for this batch's
        self.model.model.rope_deltas = None
        images: dict[str, Any] = {}
        if any(len(grid) for grid in state.grids):
            images["image_grid_thw"] = torch.cat(state.grids)  # of old images too: positions need them
        if features:
            encoded: Any = tuple(features)
            images["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=encoded)}
        result = self.model.generate(
            input_ids=state.ids,
            attention_mask=state.mask,
            mm_token_type_ids=state.types,
            past_key_values=state.cache,
            generation_config=self.config,
            logits_processor=LogitsProcessorList([first, *self.processors]),
            stopping_criteria=self.criteria,
            **images,
        )
        self.model.model.rope_deltas = None
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

    def _pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and type ids of B rows, left padded, each (B, longest)."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        return ids, mask, (ids == self.processor.image_token_id).to(mask.dtype)

    def _encode(self, images: Sequence[list[Image]]) -> tuple[list[Tensor], list[Tensor]]:
        """Vision features of every image, in order, each (visual tokens, width); and every row's grids (images, 3)."""
        flat = [image for row in images for image in row]
        if not flat:
            return [], [torch.zeros(len(row), 3, dtype=torch.long, device=self.model.device) for row in images]
        pixels = self.processor.image_processor(flat, return_tensors="pt").to(self.model.device)
        encoded = self.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
        return list(encoded.pooler_output), list(pixels["image_grid_thw"].split([len(row) for row in images]))


def _select(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A copy of the cache that holds only ``rows``, in their order; the old one stays as it was."""
    layers: list[Any] = cache.layers
    return DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in layers])
