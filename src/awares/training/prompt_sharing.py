"""The G completions of one prompt share its computation: the same numbers as TRL's, for a fraction of the work.

With short answers the prompt is most of a completion's tokens. SFT shares pictures (`vision_memo`) and the beginning of
a micro-batch's samples (`without_prefix`). The trainer overrides private methods of TRL, so upgrades may break it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate, pairwise
from typing import Any
from unittest import mock

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
        return self.accelerator.unwrap_model(self.model).get_base_model()

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return _ResumedSampler(super()._get_train_sampler(dataset), self)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with vision_memo(self.core) if self.share_prompts else nullcontext():
            return super().training_step(*args, **kwargs)

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> Any:
        """First turn (G equal prompts in a row): one prefill for each prompt. Second turn: TRL's way."""
        share = self.share_prompts and num_generations > 1
        with shared_prefill(self.core, num_generations) if share else nullcontext():
            return super()._generate_single_turn(prompt_ids, images, fields, num_generations, has_tool_images)

    def _get_per_token_logps_and_entropies(self, model: Any, ids: Any, mask: Any, keep: int, **inputs: Any) -> Any:
        if not self.share_prompts or inputs.get("pixel_values") is None:
            return super()._get_per_token_logps_and_entropies(model, ids, mask, keep, **inputs)
        with self.accelerator.autocast():
            return *packed_log_probs(model, self.core, ids, mask, keep, inputs), None


def expanded_once(
    generate: Callable[..., tuple], pad: int, prompts: list[list[int]], images: Any, **options: Any
) -> tuple:
    """TRL's ``generate`` by vLLM for ``prompts`` of token ids, in which each image has all of its ``pad`` tokens.

    vLLM must get one pad for each image and expands it. AwaresValueError unless the prompts that it reports are ours.
    """
    short = [[one for before, one in pairwise([None, *ids]) if not before == one == pad] for ids in prompts]
    seen, *written = generate(prompts=short, images=images, **options)
    for ours, theirs in zip(prompts, seen, strict=True):
        if list(theirs) != ours:
            fault = f"grpo.rollouts vllm: vLLM reads a prompt of {len(ours)} tokens as another one, of {len(theirs)}"
            fix = "use the pinned vLLM and TRL, the checkpoint's pixel limits (crops.max_pixels), or local"
            raise AwaresValueError(f"{fault}: {fix}")
    return seen, *written


class _ResumedSampler(torch.utils.data.Sampler[int]):
    """TRL's `RepeatSampler` with an order that follows from the epoch: no checkpoint holds its generator."""

    def __init__(self, plain: Any, trainer: GRPOTrainer) -> None:
        self.plain, self.trainer = plain, trainer

    def __len__(self) -> int:
        return len(self.plain)

    def __iter__(self) -> Iterator[int]:
        self.plain.generator.manual_seed(self.plain.seed)
        for _ in range(int((self.trainer.state.epoch or 0) + 1e-6)):
            torch.randperm(self.plain.num_samples, generator=self.plain.generator)
        yield from self.plain


@contextmanager
def shared_prefill(model: Any, copies: int) -> Iterator[None]:
    """Within the block ``model.generate`` prefills each prompt, ``copies`` rows with images, once."""
    generate = model.generate

    def run(**inputs: Any) -> Any:
        ids, grids, pixels = inputs["input_ids"], inputs["image_grid_thw"], inputs.pop("pixel_values")
        assert torch.equal(ids, ids[::copies].repeat_interleave(copies, dim=0))
        images = grids.view(len(ids), -1, 3)  # (rows, images of a prompt, 3)
        pieces = pixels.split(images.prod(-1).sum(-1).tolist())[::copies]
        cache = DynamicCache(config=model.config)
        fed = {name: inputs[name][::copies, :-1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        fed |= {"pixel_values": torch.cat(pieces), "image_grid_thw": images[::copies].reshape(-1, 3)}
        with torch.no_grad():
            model(**fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(copies)
        model.model.rope_deltas = model.model.rope_deltas.repeat_interleave(copies, dim=0)  # (rows, 1), the prefill's
        return generate(**inputs, past_key_values=cache)

    with mock.patch.object(model, "generate", run):
        yield


@contextmanager
def vision_memo(model: Any) -> Iterator[None]:
    """Within the block every picture passes once through the vision tower of ``model``, which must be frozen."""
    tower, known = model.model.visual, dict[Any, Tensor]()
    assert not any(weight.requires_grad for weight in tower.parameters())
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

    with mock.patch.object(tower, "forward", run):
        yield


def packed_log_probs(
    model: Any, core: Any, ids: Tensor, mask: Tensor, completion: int, images: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the completion tokens, (B, C) each, 0 on padding; a sequence for each prompt::

        [prompt without its last token | last token, completion 1 | last token, completion 2 | ...]

    Each branch sees the prompt and itself, at the positions it would have alone. ``model`` has TRL's fused head, and
    ``core`` in it. ``ids``, ``mask`` (B, P + C): prompts padded left, C = ``completion`` tokens padded right.
    ``images``: TRL's further inputs of the model, and ``num_images``.
    """
    types, grids, counts = images["mm_token_type_ids"], images["image_grid_thw"], images["num_images"]
    positions, _ = core.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grids, attention_mask=mask)
    width = ids.size(1) - completion
    pictures = list(zip(images["pixel_values"].split(grids.prod(-1).tolist()), grids, strict=True))
    pictures_of = [pictures[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]
    in_prompt = (ids[:, :width] == core.config.vision_start_token_id).sum(1).tolist()  # pictures of each prompt
    groups: dict[Any, list[int]] = {}  # rows of the same prompt and pictures
    for row in range(len(ids)):
        seen = [_digest(pixels) for pixels, _ in pictures_of[row][: in_prompt[row]]]
        groups.setdefault((*ids[row, :width][mask[row, :width].bool()].tolist(), *seen), []).append(row)
    found = []
    for rows in groups.values():
        shared = mask[rows[0], : width - 1].nonzero().flatten()  # columns of the prompt without its last token
        written = [width + mask[row, width:].nonzero().flatten() for row in rows]
        parts = [shared, *(torch.cat([shared.new_tensor([width - 1]), columns]) for columns in written)]
        lengths = torch.tensor([len(part) for part in parts], device=ids.device)
        branch = torch.arange(len(parts), device=ids.device).repeat_interleave(lengths)  # of each token; 0: the prompt
        columns, source = torch.cat(parts), torch.tensor([rows[0], *rows], device=ids.device)[branch]
        visible = (branch[None, :] == branch[:, None]) | (branch[None, :] == 0)  # (token that looks, token seen)
        targets = ids[source, columns].roll(-1)
        targets[(branch == 0) | (branch != branch.roll(-1))] = -100
        targets[-1] = -100
        later = [picture for row in rows for picture in pictures_of[row][in_prompt[row] :]]
        shown = [*pictures_of[rows[0]][: in_prompt[rows[0]]], *later]
        outputs = model(
            input_ids=ids[source, columns][None],
            attention_mask=visible.tril()[None, None],
            position_ids=positions[:, source, columns][:, None],
            pixel_values=torch.cat([pixels for pixels, _ in shown]),
            image_grid_thw=torch.stack([grid for _, grid in shown]),
            shift_labels=targets[None],
            fused_lm_head=True,
        )
        trained = targets != -100
        values = outputs.log_probs[0][trained], outputs.entropy[0][trained]
        found.append((source[trained], columns[trained] + 1 - width, *values))
    places, columns, log_probs, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
    empty, at = torch.zeros(len(ids), completion, device=ids.device), (places, columns)
    return empty.index_put(at, log_probs.to(empty.dtype)), empty.index_put(at, entropies.to(empty.dtype))


def without_prefix(core: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` of B right-padded samples from the column on where they differ, with the cache of what is before it.

    The text tokens that every sample begins with, none of them trained on, become a key-value cache that gradients pass
    through (all but the last one). ``core``: the plain model with its LoRA layers.
    """
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    same = (ids == ids[:1]).all(0) & (types == 0).all(0) & (inputs["labels"] == -100).all(0)
    shared = int(same.int().cumprod(0).sum()) - 1
    if shared < 1:
        return inputs
    mask = inputs["attention_mask"]
    positions, _ = core.model.get_rope_index(ids, types, inputs["image_grid_thw"], attention_mask=mask)
    return {
        **{name: value for name, value in inputs.items() if name != "mm_token_type_ids"},
        **{name: inputs[name][:, shared:] for name in ("input_ids", "labels", "loss_weights")},
        "position_ids": positions[..., shared:],
        "past_key_values": prefix_cache(core, ids[:1, :shared], len(ids)),
    }


def _digest(piece: Tensor) -> int:
    return hash(piece.float().cpu().numpy().tobytes())  # numpy knows no bfloat16
