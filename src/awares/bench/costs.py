"""Counted costs of a Qwen2.5-VL or Qwen3-VL: FLOPs of every part of a forward pass, bytes of the cache.

Only matrix products count, a multiply-add as 2 FLOPs: 2 for each weight and token; in attention 4 x width x queries x
keys, all pairs, as in `torch.utils.flop_counter`. In the vision tower keys are those of the same window, or all patches
in blocks with full attention: some of Qwen2.5-VL's, all of Qwen3-VL's. The latter has one more merger for each block
whose features go to the language model's first layers. The head counts where logits are computed, once a step.
"""

from typing import Any

from awares.engine.model import Grid, ImageOnlyProcessor, patch_grid
from awares.method.rollout import Trajectory

# Peaks of dense bf16 matrix products (FLOP/s) and of memory (bytes/s), from NVIDIA's data sheets (SXM, 80 GB A100)
GPUS = {"a100": (312e12, 2.039e12), "h100": (989e12, 3.35e12), "h200": (989e12, 4.8e12)}


def vision_flops(grid: Grid, config: Any) -> float:
    """The vision tower on one image of ``grid`` patches, patch embedding and mergers included."""
    vision, patches, merge = config.vision_config, grid[0] * grid[1], config.vision_config.spatial_merge_size
    embedding, block, mergers = _vision_weights(vision)
    full, squares = vision.depth, 0
    if not hasattr(vision, "deepstack_visual_indexes"):
        full = len(set(vision.fullatt_block_indexes))
        side = vision.window_size // vision.patch_size // merge  # of a window; those at an edge may be smaller
        heights, widths = ([min(side, n // merge - at) for at in range(0, n // merge, side)] for n in grid)
        squares = sum((height * width * merge**2) ** 2 for height in heights for width in widths)
    squares = full * patches**2 + (vision.depth - full) * squares
    groups = patches // merge**2
    return 2 * patches * (embedding + vision.depth * block) + 2 * groups * mergers + 4 * vision.hidden_size * squares


def prefill_flops(new: int, cached: int, config: Any, logits: int = 1) -> float:
    """The language model on ``new`` tokens of a row after ``cached`` ones; logits of the last ``logits`` positions."""
    text = config.text_config
    queries, _, layer = _layer_sizes(text)
    each = 2 * new * layer + 4 * queries * new * (cached + new)
    return text.num_hidden_layers * each + 2 * logits * text.hidden_size * text.vocab_size


def decode_flops(steps: int, cached: int, config: Any) -> float:
    """``steps`` single tokens, the first of them after ``cached`` ones."""
    return sum(prefill_flops(1, cached + step, config) for step in range(steps))


def trajectory_flops(
    trajectory: Trajectory, config: Any, processor: ImageOnlyProcessor, reuse: bool = True
) -> dict[str, tuple[float, float]]:
    """FLOPs in (first turn, second turn) of an interaction run alone, by part: vision, prefill, decode.

    With ``reuse`` the second prefill begins with the last token of the first turn, without it with the first token.
    """
    views = [sum(vision_flops(patch_grid(size, processor), config) for size in one.images) for one in trajectory.turns]
    user, first, *rest = (turn.visual_tokens + turn.text_tokens for turn in trajectory.turns)
    one = views[0], prefill_flops(user, 0, config), decode_flops(first - 1, user, config)
    two = 0.0, 0.0, 0.0
    if rest:
        known, total = user + first - 1 if reuse else 0, user + first + rest[0]
        vision = views[2] if reuse else views[0] + views[2]
        two = vision, prefill_flops(total - known, known, config), decode_flops(rest[1] - 1, total, config)
    return dict(zip(("vision", "prefill", "decode"), zip(one, two, strict=True), strict=True))


def cache_bytes(tokens: int, config: Any, bytes_per_value: int = 2) -> int:
    """Keys and values of ``tokens`` tokens in all layers."""
    return 2 * config.text_config.num_hidden_layers * _layer_sizes(config.text_config)[1] * tokens * bytes_per_value


def parameters(config: Any) -> tuple[int, int]:
    """Weights in matrices of the vision tower, and of language model and head (without the embedding lookup)."""
    text, (embedding, block, mergers) = config.text_config, _vision_weights(config.vision_config)
    language = text.num_hidden_layers * _layer_sizes(text)[2] + text.hidden_size * text.vocab_size
    return embedding + config.vision_config.depth * block + mergers, language


def _vision_weights(vision: Any) -> tuple[int, int, int]:
    """Weights in matrices of the patch embedding, of one block, and of all mergers."""
    width, merged = vision.hidden_size, vision.spatial_merge_size**2 * vision.hidden_size
    matrices, mergers = 3, 1
    if hasattr(vision, "deepstack_visual_indexes"):  # Qwen3-VL
        matrices, mergers = 2, 1 + len(vision.deepstack_visual_indexes)
    embedding = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width
    block = width * (4 * width + matrices * vision.intermediate_size)
    return embedding, block, mergers * merged * (merged + vision.out_hidden_size)


def _layer_sizes(text: Any) -> tuple[int, int, int]:
    """Widths of a token's queries and of its keys, and the weights in matrices of one language-model layer."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = head * text.num_attention_heads, head * text.num_key_value_heads
    return queries, keys, text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
