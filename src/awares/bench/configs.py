"""The paper's model and benchmarks as sizes: published architectures with random weights, typical images and answers.

Speed depends on sizes alone: weights are random, images are blank, and outputs are scripted (`latency.Script`).
"""

import math
from collections import namedtuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from awares.bench.latency import TWO_TURN_SYSTEMS, Script
from awares.engine.model import ImageOnlyProcessor, load_config, load_processor, make_processor, set_attention

# Sizes of Qwen2.5-VL, from the published config.json files; the vision towers differ in their MLP alone
Shape = namedtuple("Shape", "width mlp layers heads key_heads vocabulary tied vision_mlp", defaults=[3420])
PUBLISHED = {
    "qwen2.5-vl-7b": Shape(3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-vl-3b": Shape(2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-vl-72b": Shape(8192, 29568, 80, 64, 8, 152064, False, vision_mlp=3456),
}
HEAD_WIDTH = 128  # of the language model, at every scale: the sections of the positions add up to it
VISION_DEPTH, VISION_HEADS, VISION_HEAD_WIDTH = 32, 16, 80
EMBEDDED_BASE = Path(__file__).parents[3] / "data" / "base"  # every size uses its tokenizer
MINI = "mini"  # the embedded base model's architecture
SMALLEST_SIDE = 112  # px of an image, so that half of it and its crops still have a few tokens
MINI_IMAGES = 0.4  # of the benchmarks' sides: about the size of the embedded pages


# Typical width and height of images in px (assumed), characters of an answer per system (PAPER §5)
Benchmark = namedtuple("Benchmark", "size awares visionthink")
BENCHMARKS = {
    "chartqa": Benchmark((850, 600), 6.54, 89.46),
    "docvqa": Benchmark((1700, 2200), 13.74, 79.95),
    "ocrbench": Benchmark((1000, 750), 16.23, 178.67),
    "pope": Benchmark((640, 480), 2.84, 46.46),
    "realworldqa": Benchmark((1536, 1024), 5.57, 160.67),
    "vstar": Benchmark((2250, 1500), 5.29, 118.54),
}
CHARACTERS_PER_TOKEN = 4  # assumed: of English under Qwen's tokenizer
# Call rates: AwaRes after GRPO (Fig. 5: 72.2 % no call); VisionThink from its RTR, 0.61 = 0.25 + rate
CALL_RATES = {"awares": 0.278, "awares_naive": 0.278, "escalate_full": 0.36}
CALLS = (("top-left",), ("center",), ("right",), ("bottom-right",), ("top",))  # of the rows with a call, in turn
QUESTION = "What is written on the sign beside the door, and which colour has it?"


def build(shape: str, scale: float, dtype: str, device: str, attention: str = "") -> tuple[Any, ImageOnlyProcessor]:
    """A model of ``shape`` with random weights and ``scale`` times the parameters, and a processor for it."""
    tokenizer = load_processor(EMBEDDED_BASE).tokenizer
    config = load_config(EMBEDDED_BASE) if shape == MINI else config_of(shape, scale, tokenizer)
    torch.manual_seed(1)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    set_attention(model, attention)
    return model.eval(), make_processor(tokenizer)


def config_of(shape: str, scale: float, tokenizer: Any) -> Qwen2_5_VLConfig:
    """The published sizes times the cube root of ``scale``, with the ids of ``tokenizer``."""
    full, factor = PUBLISHED[shape], math.cbrt(scale)

    def scaled(count: int, least: int = 1) -> int:
        return max(least, round(count * factor))

    key_heads, vision_heads, depth = scaled(full.key_heads), scaled(VISION_HEADS), scaled(VISION_DEPTH, 2)
    heads = key_heads * max(1, round(full.heads * factor / key_heads))
    hidden, width = HEAD_WIDTH * heads, VISION_HEAD_WIDTH * vision_heads
    text = {"vocab_size": scaled(full.vocabulary, len(tokenizer)), "hidden_size": hidden}
    text |= {"intermediate_size": round(full.mlp / full.width * hidden), "num_hidden_layers": scaled(full.layers, 2)}
    text |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "tie_word_embeddings": full.tied}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    mlp = round(full.vision_mlp / (VISION_HEADS * VISION_HEAD_WIDTH) * width)
    vision = {"depth": depth, "hidden_size": width, "intermediate_size": mlp, "num_heads": vision_heads}
    vision["fullatt_block_indexes"] = sorted({max(0, part * depth // 4 - 1) for part in (1, 2, 3, 4)})
    vision["out_hidden_size"] = hidden
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{word}|>") for name, word in tokens.items()}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=full.tied, **ids)


def image_size(benchmark: str, shape: str, scale: float) -> tuple[int, int]:
    """(width, height) px of the images of ``benchmark``, shrunk with the model; no side below SMALLEST_SIDE."""
    factor = MINI_IMAGES if shape == MINI else math.cbrt(scale)
    width, height = (max(SMALLEST_SIDE, round(side * factor)) for side in BENCHMARKS[benchmark].size)
    return width, height


def answer_tokens(characters: float) -> int:
    """Tokens of an answer of ``characters``, with the end of the turn."""
    return math.ceil(characters / CHARACTERS_PER_TOKEN) + 1


def workload(benchmark: str, rows: int, size: tuple[int, int]) -> tuple[dict[str, list[Any]], dict[str, list[Script]]]:
    """Columns of blank ``rows``, and every system's scripts. Assumed: one-turn systems are as terse as AwaRes."""
    terse, wordy = answer_tokens(BENCHMARKS[benchmark].awares), answer_tokens(BENCHMARKS[benchmark].visionthink)
    scripts = dict.fromkeys(("full", "half"), [Script((), terse)] * rows)
    for system in TWO_TURN_SYSTEMS:
        calls, length = ((("all",),), wordy) if system == "escalate_full" else (CALLS, terse)
        made = [math.ceil(CALL_RATES[system] * row - 1e-9) for row in range(rows + 1)]  # calls before each row
        called = [calls[before % len(calls)] if after > before else () for before, after in pairwise(made)]
        scripts[system] = [Script(crops, length) for crops in called]
    columns = {"id": [f"{benchmark}-{index}" for index in range(rows)], "question": [QUESTION] * rows}
    return columns | {"image": [Image.new("RGB", size, "white")] * rows}, scripts
