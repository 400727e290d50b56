"""Counted FLOPs against torch's own counter, part by part, and what reuse and crops must save."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_bases import build
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from awares.bench import costs
from awares.bench.latency import Script, ScriptedEngine
from awares.engine.model import patch_grid, visual_tokens
from awares.method.rollout import Trajectory


def counted(work: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


@pytest.fixture(params=["qwen2.5-vl", "qwen3-vl"])
def eager(request: pytest.FixtureRequest, tiny: SimpleNamespace):
    """A tiny model of either family, attention in matrix products: torch's counter does not know the fused kernel."""
    model, processor = tiny.model, tiny.processor
    if request.param == "qwen3-vl":
        model, processor = build("qwen3-vl", processor.tokenizer)
    model.set_attn_implementation("eager")
    yield SimpleNamespace(model=model, processor=processor, noise=tiny.noise)
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("size", [(28 * 5, 28 * 9), (112, 112), (300, 100), (28 * 11, 28 * 4)])
def test_vision_tower_exactly(eager: SimpleNamespace, size: tuple[int, int]) -> None:
    pixels = eager.processor.image_processor([eager.noise(*size, 0)], return_tensors="pt")
    grid = patch_grid(size, eager.processor)
    assert pixels["image_grid_thw"].tolist() == [[1, *grid]]
    assert grid[0] * grid[1] // 4 == visual_tokens(size, eager.processor)
    found = counted(lambda: eager.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"]))
    assert costs.vision_flops(grid, eager.model.config) == found


def test_prefill_extension_and_decoding_exactly(eager: SimpleNamespace) -> None:
    model, cache = eager.model, DynamicCache(config=eager.model.config)
    for new in (57, 23, 1, 1):  # a prompt, the tool's turn behind its cache, two single tokens
        cached, ids = cache.get_seq_length(), torch.randint(0, 200, (1, new))
        found = counted(lambda ids=ids: model(input_ids=ids, past_key_values=cache, logits_to_keep=1))
        assert costs.prefill_flops(new, cached, model.config) == found
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))  # type: ignore
    assert costs.cache_bytes(57 + 23 + 2, model.config, 4) == held
    every = counted(lambda: model(input_ids=torch.randint(0, 200, (1, 57))))
    assert costs.prefill_flops(57, 0, model.config, logits=57) == every


@pytest.mark.parametrize("reuse", [True, False])
def test_whole_interactions_of_the_engine_exactly(eager: SimpleNamespace, reuse: bool) -> None:
    scripts = {"0": Script(("top-left",), 4), "1": Script((), 6), "2": Script(("right", "center"), 3)}
    engine = ScriptedEngine(eager.model, eager.processor, max_new_tokens=16, token_budget=1, reuse=reuse)
    images, done = [eager.noise(336, 224 + 56 * index, index) for index in range(3)], list[Trajectory]()
    found = counted(lambda: done.extend(engine.run_scripts(images, ["q?"] * 3, scripts)))
    parts = [costs.trajectory_flops(one, eager.model.config, eager.processor, reuse).values() for one in done]
    assert sum(sum(turns) for part in parts for turns in part) == found
