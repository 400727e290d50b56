"""The G completions of one prompt share its computation: the same numbers as TRL's, for a fraction of the work.

A GRPO batch holds every prompt G times, and with short answers the prompt is most of a completion's tokens:

- `shared_prefill`: generation prefills each prompt once and copies the key-value cache.
- `vision_memo`: the frozen vision tower encodes a picture once per update in GRPO, once per training in SFT.
- `packed_log_probs`: reference and policy passes put a prompt and all its completions into one sequence::

      [prompt without its last token | last token, completion 1 | last token, completion 2 | ...]

  Each branch sees the prompt and itself, at the positions it would have alone. The prompt's last token is in every
  branch, because it predicts the branch's first token.
- `without_prefix`: in SFT the text that all samples of a micro-batch begin with passes through the model once.

`SharedPromptTrainer` overrides private methods of TRL's trainer: an upgrade of TRL breaks this module first.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from trl import GRPOTrainer

from awares.engine.decode import prefix_cache, vision_output
from awares.errors import AwaresValueError


class SharedPromptTrainer(GRPOTrainer):
    """GRPOTrainer whose completions share the computation of their prompt, and whose order survives a restart."""

    share_prompts = False

    @property
    def core(self) -> Any:
        """The plain model with its LoRA layers."""
        return self.accelerator.unwrap_model(self.model).get_base_model()

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return ResumedSampler(super()._get_train_sampler(dataset), lambda: int((self.state.epoch or 0) + 1e-6))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch, its rollouts included where they are due."""
        with vision_memo(self.core) if self.share_prompts else contextlib.nullcontext():
            return super().training_step(*args, **kwargs)

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> Any:
        """First turn (G equal prompts in a row): one prefill for each prompt. Second turn: TRL's way."""
        share = self.share_prompts and num_generations > 1
        with shared_prefill(self.core, num_generations) if share else contextlib.nullcontext():
            return super()._generate_single_turn(prompt_ids, images, fields, num_generations, has_tool_images)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, **inputs: Any
    ) -> Any:
        """Log-probabilities and entropies of the completion tokens, (B, C) each, 0 on padding."""
        if not self.share_prompts or inputs.get("pixel_values") is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **inputs
            )
        with self.accelerator.autocast():
            return *packed_log_probs(model, self.core, input_ids, attention_mask, logits_to_keep, inputs), None


class ResumedSampler(torch.utils.data.Sampler[int]):
    """TRL's `RepeatSampler` with an order that follows from the epoch: no checkpoint holds its generator."""

    def __init__(self, plain: Any, epoch: Callable[[], int]) -> None:
        self.plain, self.epoch = plain, epoch

    def __len__(self) -> int:
        return len(self.plain)

    def __iter__(self) -> Iterator[int]:
        self.plain.generator.manual_seed(self.plain.seed)
        for _ in range(self.epoch()):
            torch.randperm(self.plain.num_samples, generator=self.plain.generator)
        yield from self.plain


@contextlib.contextmanager
def shared_prefill(model: Any, copies: int) -> Iterator[None]:
    """Within the block ``model.generate`` prefills once for ``copies`` equal rows in a run, which have images."""
    generate = model.generate

    def run(**inputs: Any) -> Any:
        ids, mask, grids = inputs["input_ids"], inputs["attention_mask"], inputs["image_grid_thw"]
        pixels, types = inputs.pop("pixel_values"), inputs["mm_token_type_ids"]
        if not torch.equal(ids, ids[::copies].repeat_interleave(copies, dim=0)):
            raise AwaresValueError(f"prompts are not {copies} times in a row: set grpo.share_prompts: false")
        images = grids.view(len(ids), -1, 3)[::copies]  # (prompts, images of a prompt, 3)
        pieces = pixels.split(grids.view(len(ids), -1, 3).prod(-1).sum(-1).tolist())[::copies]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(
                input_ids=ids[::copies, :-1],
                attention_mask=mask[::copies, :-1],
                mm_token_type_ids=types[::copies, :-1],
                pixel_values=torch.cat(pieces),
                image_grid_thw=images.reshape(-1, 3),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache.batch_repeat_interleave(copies)
        model.model.rope_deltas = model.model.rope_deltas.repeat_interleave(copies, dim=0)  # (rows, 1), the prefill's
        return generate(**inputs, past_key_values=cache)

    model.generate = run
    try:
        yield
    finally:
        del model.generate  # the class's own method shows again


@contextlib.contextmanager
def vision_memo(model: Any) -> Iterator[None]:
    """Within the block the vision tower of ``model``, which must be frozen, passes every picture through once."""
    tower, known = model.model.visual, dict[Any, Tensor]()
    if any(weight.requires_grad for weight in tower.parameters()):
        raise AwaresValueError("the vision tower is trained: set grpo.share_prompts and sft.share_computation to false")
    forward, area = tower.forward, tower.spatial_merge_size**2

    def run(hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        pieces = hidden_states.split(grid_thw.prod(-1).tolist())
        seen = [(_digest(piece), *grid) for piece, grid in zip(pieces, grid_thw.tolist(), strict=True)]
        fresh = {key: index for index, key in enumerate(seen) if key not in known}
        if fresh:
            places = list(fresh.values())
            with torch.no_grad():
                found = forward(torch.cat([pieces[place] for place in places]), grid_thw[places], **kwargs)
            levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
            features = torch.cat(levels, dim=-1).split([len(pieces[place]) // area for place in places])
            known.update(zip(fresh, features, strict=True))
        pooled, *deep = torch.cat([known[key] for key in seen]).split(model.config.text_config.hidden_size, dim=-1)
        return vision_output(pooled, deep)

    tower.forward = run
    try:
        yield
    finally:
        del tower.forward  # the class's own method shows again


def _digest(piece: Tensor) -> int:
    """Hash of a picture's pixels."""
    return hash(piece.float().cpu().numpy().tobytes())  # numpy knows no bfloat16


@dataclass
class PackedBatch:
    """B completions as TRL lays them out: prompts (P) padded left, completions (C) padded right; images by row."""

    ids: Tensor  # (B, P + C)
    mask: Tensor  # (B, P + C), 1 = a real token
    positions: Tensor  # (3, B, P + C), Qwen2.5-VL's
    prompt: int  # P
    pixels: list[list[Tensor]]  # of each row, of each image: (patches, pixels of a patch)
    grids: list[Tensor]  # of each row: (images, 3)
    prompt_images: list[int]  # of each row: how many of its images stand in the prompt


def packed_log_probs(
    model: Any,  # a model with TRL's fused head
    core: Any,  # the plain model inside it
    ids: Tensor,
    mask: Tensor,
    completion: int,
    images: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the completion tokens, (B, C) each, 0 on padding.

    ``ids``, ``mask`` (B, P + C), C = ``completion``; ``images``: TRL's ``pixel_values`` and ``image_grid_thw`` of all
    images, ``num_images`` of each row, ``mm_token_type_ids`` (B, P + C).
    """
    types, grids, counts = images["mm_token_type_ids"], images["image_grid_thw"], images["num_images"]
    positions, _ = core.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grids, attention_mask=mask)
    prompt = ids.size(1) - completion
    per_image = iter(images["pixel_values"].split(grids.prod(-1).tolist()))
    start = core.config.vision_start_token_id
    batch = PackedBatch(
        ids, mask, positions, prompt,
        pixels=[[next(per_image) for _ in range(count)] for count in counts],
        grids=list(grids.split(counts)),
        prompt_images=(ids[:, :prompt] == start).sum(1).tolist(),
    )  # fmt: skip
    found = [_one_sequence(model, batch, rows) for rows in _groups(batch)]
    where = torch.cat([index for index, _, _ in found])  # (tokens, 2): row, column of the completion
    scatter = tuple(where.T)
    empty = torch.zeros(len(ids), completion, device=ids.device)
    log_probs, entropies = (torch.cat([part[i] for part in found]).to(empty.dtype) for i in (1, 2))
    return empty.index_put(scatter, log_probs), empty.index_put(scatter, entropies)


def _groups(batch: PackedBatch) -> list[list[int]]:
    """Rows by prompt: the same tokens and the same pictures."""
    groups: dict[Any, list[int]] = {}
    for row in range(len(batch.ids)):
        real = batch.ids[row, : batch.prompt][batch.mask[row, : batch.prompt].bool()]
        seen = [_digest(piece) for piece in batch.pixels[row][: batch.prompt_images[row]]]
        groups.setdefault((tuple(real.tolist()), tuple(seen)), []).append(row)
    return list(groups.values())


def _one_sequence(model: Any, batch: PackedBatch, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The completions of one prompt in one sequence -> places of their tokens (N, 2), log-probs, entropies (N,)."""
    first, width = rows[0], batch.prompt
    shared = batch.mask[first, : width - 1].nonzero().flatten()  # columns of the prompt without its last token
    ids, positions = [batch.ids[first, shared]], [batch.positions[:, first, shared]]
    branch, labels = [torch.zeros_like(ids[0])], [torch.full_like(ids[0], -100)]
    shown = batch.prompt_images[first]
    pixels, grids = batch.pixels[first][:shown], [batch.grids[first][:shown]]
    where = []
    for number, row in enumerate(rows, start=1):
        columns = torch.cat([batch.ids.new_tensor([width - 1]), width + batch.mask[row, width:].nonzero().flatten()])
        ids.append(batch.ids[row, columns])
        positions.append(batch.positions[:, row, columns])
        branch.append(torch.full_like(columns, number))
        labels.append(torch.cat([batch.ids[row, columns[1:]], columns.new_tensor([-100])]))
        where.append(torch.stack([torch.full_like(columns[1:], row), columns[1:] - width], dim=1))
        pixels = pixels + batch.pixels[row][batch.prompt_images[row] :]
        grids.append(batch.grids[row][batch.prompt_images[row] :])
    targets = torch.cat(labels)
    outputs = model(
        input_ids=torch.cat(ids)[None],
        attention_mask=_visible(torch.cat(branch))[None, None],
        position_ids=torch.cat(positions, dim=1)[:, None],
        pixel_values=torch.cat(pixels),
        image_grid_thw=torch.cat(grids),
        shift_labels=targets[None],
        fused_lm_head=True,
    )
    trained = targets != -100
    return torch.cat(where), outputs.log_probs[0][trained], outputs.entropy[0][trained]


def _visible(branch: Tensor) -> Tensor:
    """(L,) branch numbers, 0 = the prompt -> (L, L): which token (column) each token (row) may look at."""
    same = (branch[None, :] == branch[:, None]) | (branch[None, :] == 0)
    return same.tril()


def without_prefix(core: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` of B right-padded samples from the column on where they differ, with the cache of what is before it.

    ``core``: the plain model with its LoRA layers. The text tokens that every sample begins with, none of them trained
    on, become a key-value cache that gradients pass through (all but the last one). Every position stays the same.
    """
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    same = (ids == ids[:1]).all(0) & (types == 0).all(0) & (inputs["labels"] == -100).all(0)
    shared = int(same.int().cumprod(0).sum()) - 1
    if shared < 1:
        return inputs
    positions, _ = core.model.get_rope_index(
        ids, mm_token_type_ids=types, image_grid_thw=inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
    )
    return {
        **{name: value for name, value in inputs.items() if name != "mm_token_type_ids"},
        **{name: inputs[name][:, shared:] for name in ("input_ids", "labels", "loss_weights")},
        "position_ids": positions[..., shared:],
        "past_key_values": prefix_cache(core, ids[:1, :shared], len(ids)),
    }
