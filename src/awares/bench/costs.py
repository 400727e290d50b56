"""Counted costs of a Qwen2.5-VL or Qwen3-VL: FLOPs of every part of a forward pass, cache bytes, time on a roofline.

A multiply-add is 2 FLOPs. Only matrix products count, as in `torch.utils.flop_counter`; norms, rotations and
activations are of lower order. Attention counts all queries x keys, as kernels without a causal shortcut and torch do.

Vision tower, for an image of P patches of 14 px, width D, MLP width I, merge groups of m = 4 patches, output width H:

    patch embedding   2 P (3 * 2 * 14 * 14) D
    each block        2 P D 3D + 2 P D D + 3 * 2 P D I + 4 D sum(s^2)
                      s: patches of each attention window; blocks with full attention have one window, s = P
    merger            2 (P / m) (mD) (mD) + 2 (P / m) (mD) H

Qwen3-VL: patches of 16 px, an MLP of 2 matrices instead of 3, full attention in all blocks, one more merger for each
block whose features go to the language model's first layers.

Language model, n new tokens of a row with c tokens in its cache, width H, query width Q (H in Qwen2.5-VL), key-value
width K, MLP width J, L layers:

    L (2 n H (2Q + 2K) + 3 * 2 n H J + 4 Q n (c + n))
    language-model head, for each position whose logits are computed (one per step): 2 H V
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from awares.engine.model import Grid, ImageOnlyProcessor, patch_grid
from awares.method.rollout import Trajectory


@dataclass(frozen=True)
class Gpu:
    """Peak of dense bf16 matrix products (FLOP/s) and of memory (bytes/s), from the manufacturer's data sheet."""

    flops: float
    bandwidth: float
    source: str


GPUS = {
    "a100": Gpu(312e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Gpu(989e12, 3.35e12, "NVIDIA H100 SXM data sheet"),
    "h200": Gpu(989e12, 4.8e12, "NVIDIA H200 SXM data sheet"),
}


@dataclass(frozen=True)
class Costs:
    """FLOPs of one interaction, each as (first turn, second turn)."""

    vision: tuple[float, float]
    prefill: tuple[float, float]
    decode: tuple[float, float]

    @property
    def total(self) -> float:
        return sum(self.vision) + sum(self.prefill) + sum(self.decode)


def window_sizes(grid: Grid, config: Any) -> list[int]:
    """Patches of every attention window of an image; windows at the right and lower edge may be smaller."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    side = vision.window_size // vision.patch_size // merge  # in merge groups
    heights, widths = ([min(side, n // merge - at) for at in range(0, n // merge, side)] for n in grid)
    return [height * width * merge**2 for height in heights for width in widths]


def vision_flops(grid: Grid, config: Any) -> float:
    """The vision tower on one image of ``grid`` patches, patch embedding and merger included."""
    vision = config.vision_config
    patches, width, group = grid[0] * grid[1], vision.hidden_size, vision.spatial_merge_size**2
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    embedding = 2 * patches * pixels * width
    matrices, mergers, full = _tower(vision)
    linear = 2 * patches * width * (4 * width + matrices * vision.intermediate_size)
    squares = full * patches**2
    if full < vision.depth:
        squares += (vision.depth - full) * sum(s**2 for s in window_sizes(grid, config))
    merger = 2 * patches // group * (group * width) * (group * width + vision.out_hidden_size)
    return embedding + vision.depth * linear + 4 * width * squares + mergers * merger


def _tower(vision: Any) -> tuple[int, int, int]:
    """Differences of the families' vision towers: matrices of a block's MLP, mergers, blocks with full attention."""
    if hasattr(vision, "deepstack_visual_indexes"):
        return 2, 1 + len(vision.deepstack_visual_indexes), vision.depth
    return 3, 1, sum(index in vision.fullatt_block_indexes for index in range(vision.depth))


def _heads(text: Any) -> tuple[int, int]:
    """Widths of all queries and of all keys of a token."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return head * text.num_attention_heads, head * text.num_key_value_heads


def prefill_flops(new: int, cached: int, config: Any, logits: int = 1) -> float:
    """The language model on ``new`` tokens of a row after ``cached`` ones; logits of the last ``logits`` positions."""
    text = config.text_config
    width, (queries, keys) = text.hidden_size, _heads(text)
    linear = 2 * new * width * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    attention = 4 * queries * new * (cached + new)
    return text.num_hidden_layers * (linear + attention) + 2 * logits * width * text.vocab_size


def decode_flops(steps: int, cached: int, config: Any) -> float:
    """``steps`` single tokens, the first of them after ``cached`` ones."""
    return sum(prefill_flops(1, cached + step, config) for step in range(steps))


def trajectory_flops(trajectory: Trajectory, config: Any, processor: ImageOnlyProcessor, reuse: bool = True) -> Costs:
    """FLOPs of one interaction of the engine, run alone; ``reuse=False``: its second turn prefills everything again.

    A batch that shares the system prompt needs less, padding needs more. The last token of a turn is not fed in that
    turn: with reuse, the second turn's prefill begins with it.
    """
    views = [
        sum(vision_flops(patch_grid(size, processor), config) for size in turn.images) for turn in trajectory.turns
    ]
    user, first, *rest = ((turn.visual_tokens + turn.text_tokens) for turn in trajectory.turns)
    vision, prefill = [views[0], 0.0], [prefill_flops(user, 0, config), 0.0]
    decode = [decode_flops(first - 1, user, config), 0.0]
    if rest:
        tool, answer = rest
        known = user + first - 1 if reuse else 0
        vision[1] = views[2] if reuse else views[0] + views[2]
        prefill[1] = prefill_flops(user + first + tool - known, known, config)
        decode[1] = decode_flops(answer - 1, user + first + tool, config)
    return Costs((vision[0], vision[1]), (prefill[0], prefill[1]), (decode[0], decode[1]))


def cache_bytes(tokens: int, config: Any, bytes_per_value: int = 2) -> int:
    """Keys and values of ``tokens`` tokens in all layers."""
    return 2 * config.text_config.num_hidden_layers * _heads(config.text_config)[1] * tokens * bytes_per_value


def parameters(config: Any) -> tuple[int, int]:
    """Weights in matrices of the vision tower, and of language model and head (without the embedding lookup)."""
    vision, text = config.vision_config, config.text_config
    width, group = vision.hidden_size, vision.spatial_merge_size**2
    matrices, mergers, _ = _tower(vision)
    block = width * (4 * width + matrices * vision.intermediate_size)
    merger = group * width * (group * width + vision.out_hidden_size)
    tower = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width
    tower += vision.depth * block + mergers * merger
    queries, keys = _heads(text)
    layer = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    return tower, text.num_hidden_layers * layer + text.hidden_size * text.vocab_size


def roofline_seconds(
    trajectories: Sequence[Trajectory],
    config: Any,
    processor: ImageOnlyProcessor,
    gpu: Gpu,
    reuse: bool = True,
    bytes_per_value: int = 2,
) -> dict[str, float]:
    """Least seconds of ``gpu`` for these interactions *as one batch*, by part: vision, prefill, decode.

    A part takes the longer of its FLOPs at peak and its bytes at peak. Bytes are the weights, once per pass, and the
    caches that the pass reads. A batch decodes as many steps as its longest row.
    """
    assert trajectories
    found = [trajectory_flops(one, config, processor, reuse) for one in trajectories]
    tower, language = (bytes_per_value * count for count in parameters(config))
    seconds = dict.fromkeys(("vision", "prefill", "decode"), 0.0)
    for turn in (0, 1):
        rows = [one for one in trajectories if len(one.turns) > 2 * turn]
        if not rows:
            continue
        steps = [one.turns[2 * turn + 1].text_tokens - 1 for one in rows]
        known = [_tokens_before(one, 2 * turn + 1) for one in rows]
        read = sum(
            cache_bytes(n * (length + n // 2), config, bytes_per_value) for n, length in zip(steps, known, strict=True)
        )
        work = {
            "vision": (sum(one.vision[turn] for one in found), tower),
            "prefill": (sum(one.prefill[turn] for one in found), language),
            "decode": (sum(one.decode[turn] for one in found), max(steps) * language + read),
        }
        for part, (flops, moved) in work.items():
            seconds[part] += max(flops / gpu.flops, moved / gpu.bandwidth) if flops else 0.0
    return seconds


def _tokens_before(trajectory: Trajectory, turn: int) -> int:
    return sum(one.visual_tokens + one.text_tokens for one in trajectory.turns[:turn])
