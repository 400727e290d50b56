"""Counted FLOPs against torch's own counter, part by part, and what reuse and crops must save."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_bases import qwen3
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from awares.bench import costs
from awares.bench.scripted import Script, ScriptedEngine
from awares.engine.decode import Decoder
from awares.engine.model import ImageOnlyProcessor, patch_grid, visual_tokens
from awares.method import protocol
from awares.method.rollout import Trajectory


def counted(work: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=["qwen2.5-vl", "qwen3-vl"])
def family(request: pytest.FixtureRequest, tiny: SimpleNamespace) -> SimpleNamespace:
    """A tiny model of either family."""
    if request.param == "qwen2.5-vl":
        return tiny
    torch.manual_seed(0)
    model, patch = qwen3(tiny.processor.tokenizer)
    size = {"shortest_edge": 4 * patch * patch, "longest_edge": 2000 * 2000}
    pictures = Qwen2VLImageProcessorPil(patch_size=patch, size=size)
    processor = ImageOnlyProcessor(pictures, tiny.processor.tokenizer)
    return SimpleNamespace(model=model.eval(), processor=processor, noise=tiny.noise)


@pytest.fixture
def eager(family: SimpleNamespace):
    """The model with attention in plain matrix products: torch's counter does not know the CPU's fused kernel."""
    family.model.set_attn_implementation("eager")
    yield family
    family.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("size", [(28 * 5, 28 * 9), (112, 112), (300, 100), (28 * 11, 28 * 4)])
def test_vision_tower_exactly(eager: SimpleNamespace, size: tuple[int, int]) -> None:
    pixels = eager.processor.image_processor([eager.noise(*size, 0)], return_tensors="pt")
    grid = patch_grid(size, eager.processor)
    assert pixels["image_grid_thw"].tolist() == [[1, *grid]]
    assert grid[0] * grid[1] // 4 == visual_tokens(size, eager.processor)
    found = counted(lambda: eager.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"]))
    assert costs.vision_flops(grid, eager.model.config) == found


@pytest.mark.parametrize("grid", [(10, 18), (8, 8), (22, 8)])
def test_windows_cover_the_image(tiny: SimpleNamespace, grid: tuple[int, int]) -> None:
    windows = costs.window_sizes(grid, tiny.model.config)
    assert sum(windows) == grid[0] * grid[1] and max(windows) <= 64


def test_prefill_extension_and_decoding_exactly(eager: SimpleNamespace) -> None:
    from transformers import DynamicCache

    model, cache = eager.model, DynamicCache(config=eager.model.config)
    for new in (57, 23, 1, 1):  # a prompt, the tool's turn behind its cache, two single tokens
        cached, ids = cache.get_seq_length(), torch.randint(0, 200, (1, new))
        found = counted(lambda ids=ids: model(input_ids=ids, past_key_values=cache, logits_to_keep=1))
        assert costs.prefill_flops(new, cached, model.config) == found
    every = counted(lambda: model(input_ids=torch.randint(0, 200, (1, 57))))
    assert costs.prefill_flops(57, 0, model.config, logits=57) == every
    three = sum(costs.prefill_flops(1, 80 + step, model.config) for step in range(3))
    assert costs.decode_flops(3, 80, model.config) == three


def interactions(tiny: SimpleNamespace, reuse: bool = True, scripts: tuple[Script, ...] = ()) -> list[Trajectory]:
    scripts = scripts or (Script(("top-left",), 4), Script((), 6), Script(("right", "center"), 3))
    engine = ScriptedEngine(tiny.model, tiny.processor, max_new_tokens=16, token_budget=1, reuse=reuse)
    images = [tiny.noise(336, 224 + 56 * index, index) for index in range(len(scripts))]
    ids = [str(index) for index in range(len(scripts))]
    return engine.run_scripts(images, ["what is it?"] * len(scripts), ids, scripts)


@pytest.mark.parametrize("reuse", [True, False])
def test_whole_interactions_of_the_engine_exactly(eager: SimpleNamespace, reuse: bool) -> None:
    done: list[Trajectory] = []
    found = counted(lambda: done.extend(interactions(eager, reuse)))
    total = sum(costs.trajectory_flops(one, eager.model.config, eager.processor, reuse).total for one in done)
    assert total == found


def test_reuse_saves_two_fifths_of_the_second_prefill_and_more(tiny: SimpleNamespace) -> None:
    """With the embedded model's shape the language model alone, and with it the vision tower, which naive runs again."""
    for one in interactions(tiny):
        if len(one.turns) < 4:
            continue
        reused, naive = (
            costs.trajectory_flops(one, tiny.model.config, tiny.processor, reuse) for reuse in (True, False)
        )
        assert reused.prefill[1] <= 0.6 * naive.prefill[1]
        assert reused.vision[1] < naive.vision[1]
        assert (reused.vision[0], reused.prefill[0], reused.decode) == (naive.vision[0], naive.prefill[0], naive.decode)


def test_a_row_costs_less_than_the_full_image(tiny: SimpleNamespace) -> None:
    script = [Script(("top-left",), 4), Script((), 4)]
    engine = ScriptedEngine(tiny.model, tiny.processor, max_new_tokens=16)
    images = [tiny.noise(896, 672, 0)] * 2
    called, direct = engine.run_scripts(images, ["what is it?"] * 2, ["a", "b"], script)
    full = engine.answer_scripts(images[:1], ["what is it?"], "full", ["a"], script[1:])[0]
    flops = [costs.trajectory_flops(one, tiny.model.config, tiny.processor).total for one in (direct, called, full)]
    assert flops == sorted(flops)


def test_bytes(family: SimpleNamespace) -> None:
    decoder = Decoder(family.model, family.processor, max_new_tokens=2)
    image = family.noise(112, 112, 0)
    text = family.processor.apply_chat_template(
        protocol.messages("q", None), tokenize=False, add_generation_prompt=True
    )
    cache = decoder.start([decoder.tokenize(text, [image.size])], [[image]]).state.cache
    layers: list[Any] = cache.layers
    held = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    assert costs.cache_bytes(cache.get_seq_length(), family.model.config, 4) == held


def test_parameters_are_the_models_matrices(family: SimpleNamespace) -> None:
    tower, language = costs.parameters(family.model.config)
    matrices = {name: weight.numel() for name, weight in family.model.named_parameters() if weight.dim() > 1}
    matrices.pop("model.visual.pos_embed.weight", None)  # looked up
    assert tower == sum(count for name, count in matrices.items() if ".visual." in name)
    rest = {name: count for name, count in matrices.items() if ".visual." not in name and "embed_tokens" not in name}
    assert language == sum(rest.values())


def test_roofline(tiny: SimpleNamespace) -> None:
    config, done = tiny.model.config, interactions(tiny)
    slow_memory, slow_sums = costs.Gpu(1e30, 1e9, "test"), costs.Gpu(1e9, 1e30, "test")
    by_flops = costs.roofline_seconds(done, config, tiny.processor, slow_sums)
    total = sum(costs.trajectory_flops(one, config, tiny.processor).total for one in done)
    assert sum(by_flops.values()) == pytest.approx(total / 1e9)
    tower, language = costs.parameters(config)
    by_bytes = costs.roofline_seconds(done, config, tiny.processor, slow_memory)
    assert by_bytes["vision"] == pytest.approx(2 * 2 * tower / 1e9)  # two turns, two bytes a weight
    assert by_bytes["prefill"] == pytest.approx(2 * 2 * language / 1e9)
    steps = max(one.turns[1].text_tokens for one in done) - 1 + 4 - 1
    assert by_bytes["decode"] > steps * 2 * language / 1e9
