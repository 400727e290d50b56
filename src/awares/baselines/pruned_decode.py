"""Decoding with fewer visual tokens: the sequences get shorter; transformers' Qwen2.5-VL is unmodified.

`VisionPruned` removes tokens before the language model, `LayerPruned` between its layers. Positions are computed on the
full sequence and gathered, so a kept token stays where it was. Rows that keep different numbers of tokens are padded on
the left again. Torch's module hooks read and replace tensors, so every attention implementation works.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb, apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from awares.baselines import pruning
from awares.baselines.pruning import Selection
from awares.engine.decode import Decoder, Kept, Output, State
from awares.engine.model import ImageOnlyProcessor
from awares.errors import AwaresValueError


class Pruned(Decoder):
    """A decoder for one turn. ``left``: row id -> visual tokens (in raster order) that are left at the end."""

    vision_patches = float("inf")  # all images at once: the hooks keep one call of the last block
    shares_prefix = False  # dropped tokens are counted over whole sequences

    def __init__(self, model: Any, processor: ImageOnlyProcessor, max_new_tokens: int) -> None:
        super().__init__(model, processor, max_new_tokens)
        kind = model.config.model_type
        if kind != "qwen2_5_vl":
            raise AwaresValueError(f"pruners of visual tokens are written for Qwen2.5-VL, not for {kind}")
        self.left: dict[str, list[int]] = {}

    def extend(self, *arguments: Any, **options: Any) -> Output:
        raise AwaresValueError("a system that prunes visual tokens answers in one turn: use Engine.answer, not run")


class VisionFeatures(NamedTuple):
    """One image after the vision tower, N visual tokens in raster order; scores and keys if a pruner reads them."""

    features: Tensor  # (N, width), the language model's input
    scores: Tensor  # (N,), attention received in the last block, pooled over each merge group
    keys: Tensor  # (N, head_dim), the last block's keys before rotary embedding, pooled over heads and merge group
    name: str  # the row's id and the image's number in the row


class VisionPruned(Pruned):
    """Keeps what ``select`` chooses of each image before the language model; ``attention=False``: no scores, keys."""

    def __init__(self, *given: Any, select: Callable[[VisionFeatures], Selection], attention: bool = True) -> None:
        super().__init__(*given)
        self.select, self.attention = select, attention

    @torch.no_grad()
    def start(self, rows: Any, images: Any, call_bias: Any = None, names: Any = None) -> Output:
        """`Decoder.start` on the kept visual tokens, each at its position in the full sequence."""
        names = names or [str(row) for row in range(len(rows))]
        titles = [f"{name}/{n}" for name, row in zip(names, images, strict=True) for n in range(len(row))]
        views, grids = self._see(images, titles)
        chosen = [self.select(view) for view in views]
        ids, mask, types = self._pad(rows)
        keep = mask.bool()
        pairs = zip(views, chosen, strict=True)
        kept = [torch.isin(torch.arange(len(view.features)), one.kept.cpu()) for view, one in pairs]
        keep[types.bool()] = torch.cat(kept).to(keep)
        for name, flags, visual in zip(names, keep, types.bool(), strict=True):
            self.left[name] = flags[visual].nonzero().flatten().tolist()
        positions, _ = self.model.model.get_rope_index(ids, types, torch.cat(grids), attention_mask=mask)
        index, mask = pruning.pack_left(keep)
        ids, types = ids.gather(1, index).masked_fill(mask == 0, self.pad), types.gather(1, index) * mask
        positions, cache = positions.gather(2, index.expand(3, -1, -1)), DynamicCache(config=self.model.config)
        state = State(ids, mask, types, [list(row) for row in images], grids, cache, positions)
        output = self._generate(state, [one.vectors for one in chosen], call_bias)
        output.kept = [Kept(count, float(count)) for count in state.types.sum(dim=1).tolist()]
        return output

    def _see(self, images: Sequence[list[Image]], titles: Sequence[str]) -> tuple[list[VisionFeatures], list[Tensor]]:
        """`VisionFeatures` of every image, in order; and every row's grids."""
        visual, tapped = self.model.model.visual, dict[str, Any]()
        attention = visual.blocks[-1].attn
        with (
            attention.register_forward_pre_hook(lambda _, __, inputs: tapped.update(inputs), with_kwargs=True),
            attention.qkv.register_forward_hook(lambda _, __, output: tapped.update(qkv=output)),
        ):
            features, grids = self._encode(images)
        scores = keys = [torch.empty(0)] * len(features)
        if self.attention:
            query, key, _ = tapped["qkv"].unflatten(-1, (3, attention.num_heads, -1)).unbind(1)  # (S, heads, head_dim)
            turned = apply_rotary_pos_emb_vision(query, key, *tapped["position_embeddings"])
            received = pruning.received(*turned, tapped["cu_seqlens"].diff().tolist(), attention.scaling)
            sizes = visual.spatial_merge_size, visual.window_size, visual.patch_size
            order, _ = get_vision_window_index(torch.cat(grids), *sizes)
            raster, groups = order.to(received.device).argsort(), (-1, visual.spatial_merge_unit)  # windows -> raster
            pooled = (values.unflatten(0, groups).mean(dim=1) for values in (received, key.float().mean(dim=1)))
            scores, keys = (values[raster].split([len(one) for one in features]) for values in pooled)
        return [VisionFeatures(*one) for one in zip(features, scores, keys, titles, strict=True)], grids


class PruningPlan(NamedTuple):
    """Where and how tokens are dropped.

    ``shares``: layer -> fraction of all visual tokens in it and the following layers. ``choose``: attention (Q, N) of
    the text tokens after the image, in the previous layer, hidden states (N, width), a count -> the tokens to keep.
    ``nominal``: the ratio in a system's name counts the tokens at the end (last) or the mean over the layers (mean).
    """

    shares: Mapping[int, float]
    choose: Callable[[Tensor, Tensor, int], Selection]
    nominal: str


class LayerPruned(Pruned):
    """Drops visual tokens between the language model's layers; ``plan``: its depth -> where and how."""

    def __init__(self, *given: Any, plan: Callable[[int], PruningPlan]) -> None:
        super().__init__(*given)
        self.language_model = self.model.model.language_model
        if self.language_model.has_sliding_layers:
            raise AwaresValueError("dropping tokens between layers needs full attention, not sliding windows")
        self.plan = plan(len(self.language_model.layers))

    def _generate(self, state: State, *arguments: Any, **options: Any) -> Output:
        dropping = Dropping(self.language_model, self.plan, state)
        with ExitStack() as hooks:
            for hook in dropping.hooks():
                hooks.enter_context(hook)
            output = super()._generate(state, *arguments, **options)
        output.kept = dropping.kept()
        for name, number, flags in zip(self.names, dropping.number, dropping.visual, strict=True):
            self.left[name] = number[flags].tolist()
        return output


class Dropping:
    """Hooks on the decoder layers for one generation: each stage (a layer of the plan) shortens the sequences.

    During the prefill a stage picks tokens and gathers hidden states and rotary angles. Each layer's cache then has its
    own length, for which `create_causal_mask` has ``layer_idx``.
    """

    def __init__(self, language_model: Any, plan: PruningPlan, state: State) -> None:
        self.model, self.plan = language_model, plan
        self.mask, self.visual = state.mask, state.types.bool()  # (B, T) of the tokens that are left
        self.number = self.visual.cumsum(dim=1) - 1  # (B, T): index of a visual token among those of its row
        self.total = self.visual.sum(dim=1)
        self.masks: dict[int, Tensor] = {}  # of each stage, after its drop
        self.counts: dict[int, Tensor] = {0: self.total}  # of each stage: visual tokens (B,)
        self.queries: dict[int, Tensor] = {}  # of each stage, from the layer before it
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.causal: Any = None  # the mask of the current stage

    def hooks(self) -> Iterator[Any]:
        layers = self.model.layers
        for stage in self.plan.shares:
            projection = layers[stage - 1].self_attn.q_proj
            yield projection.register_forward_hook(lambda _, __, query, at=stage: self.queries.update({at: query}))
        for index in range(min(self.plan.shares), len(layers)):
            yield layers[index].register_forward_pre_hook(partial(self._before, index), with_kwargs=True)

    def kept(self) -> list[Kept]:
        ends = [*list(self.counts)[1:], len(self.model.layers)]
        spans = torch.tensor([end - begin for begin, end in zip(self.counts, ends, strict=True)])
        counts = torch.stack(list(self.counts.values())).cpu()  # (stages, B)
        means = (counts * spans[:, None]).sum(dim=0) / spans.sum()
        nominal = means.round() if self.plan.nominal == "mean" else counts[-1]
        return [Kept(int(n), mean) for n, mean in zip(nominal.tolist(), means.tolist(), strict=True)]

    def _before(self, index: int, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        hidden, cache = inputs[0], options["past_key_values"]
        known = cache.get_seq_length(index)
        if index in self.plan.shares:
            if not known:
                hidden = self._drop(index, hidden, cache, self.rotary or options["position_embeddings"])
            written = known + hidden.shape[1] - self.masks[index].shape[1]
            mask = pad(self.masks[index], (0, written), value=1)
            self.causal = create_causal_mask(self.model.config, hidden, mask, cache, layer_idx=index)
        if not known:
            options["position_embeddings"] = self.rotary
        options["attention_mask"], options["position_ids"] = self.causal, None
        return (hidden, *inputs[1:]), options

    def _drop(self, index: int, hidden: Tensor, cache: Any, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Choose for every row and gather; hidden (B, T, width) -> (B, T', width)."""
        attention = self.model.layers[index - 1].self_attn
        query = self.queries.pop(index).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, *rotary)
        keys, hidden, keep = cache.layers[index - 1].keys, hidden.clone(), self.mask.bool()
        positions = torch.arange(keep.shape[1], device=keep.device)
        for row, places in enumerate(flags.nonzero().flatten() for flags in self.visual):
            text = positions[places[-1] + 1 :]  # all of them see the whole image, none is padding
            allowed = (positions[None, :] <= text[:, None]) & self.mask[row].bool()
            weights = pruning.attention_of(query[row][:, text], keys[row], allowed, attention.scaling)[:, places]
            count = min(pruning.budget(int(self.total[row]), self.plan.shares[index]), len(places))
            chosen = self.plan.choose(weights, hidden[row, places], count)
            keep[row, places] = False
            keep[row, places[chosen.kept]] = True
            hidden[row, places[chosen.kept]] = chosen.vectors
        gather, self.mask = pruning.pack_left(keep)
        self.visual = self.visual.gather(1, gather) & self.mask.bool()
        self.number = self.number.gather(1, gather)
        self.masks[index], self.counts[index] = self.mask, self.visual.sum(dim=1)
        cos, sin, left = (one.gather(1, gather[..., None].expand(-1, -1, one.shape[-1])) for one in (*rotary, hidden))
        self.rotary = (cos, sin)
        return left
