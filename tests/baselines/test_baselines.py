"""The compared systems: shorter sequences, same positions, nothing changed at ratio 1."""

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import ImageEnhance
from torch import Tensor
from transformers import AttentionInterface

from awares.baselines import pruning, systems
from awares.baselines import registry as baselines
from awares.baselines.pruning import Selection
from awares.baselines.registry import SystemJob
from awares.config import load_params
from awares.engine.decode import Decoder
from awares.errors import AwaresError
from awares.method import crops, protocol
from awares.method.rollout import Engine, Trajectory
from awares.registry import system

INSIDE = ("fastv", "sparsevlm")
PRUNERS = ("visionzip", "holov", "random_token", *INSIDE)
CASES = "holov_50 random_token_70 visionzip_36.4 fastv_50 sparsevlm_70 sparsevlm_40".split()
SIZES = [(224, 168), (140, 280), (280, 112), (224, 224), (168, 196)]  # px; no two grids alike
TIE = 1e-4


def job(tiny: SimpleNamespace, count: int = 5, tokens: int = 8, **options: Any) -> SystemJob:
    rows = {"id": [f"row-{n}" for n in range(count)], "question": ["what" + " else" * n for n in range(count)]}
    rows |= {"image": [tiny.noise(*SIZES[n % len(SIZES)], n) for n in range(count)]}
    return SystemJob(Engine(tiny.model, tiny.processor, max_new_tokens=tokens, **options), rows)


def single(tiny: SimpleNamespace, of: SystemJob, row: int) -> dict[str, Tensor]:
    """One row as the processor makes it, with its full mRoPE positions."""
    messages = protocol.user_messages(of.rows["question"][row], [of.rows["image"][row]])
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = tiny.processor.apply_chat_template(messages, **options)
    names = "input_ids", "mm_token_type_ids", "image_grid_thw"
    positions, _ = tiny.model.model.get_rope_index(*map(batch.get, names), attention_mask=batch["attention_mask"])
    return {**batch, "position_ids": positions}


def prompts(tiny: SimpleNamespace, of: SystemJob) -> Any:
    """What the engine gives to a decoder for the full view."""
    ids = [single(tiny, of, row)["input_ids"][0].tolist() for row in range(len(of.rows["id"]))]
    return ids, [[image] for image in of.rows["image"]], None, of.rows["id"]


def pruned_decoder(of: SystemJob, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The decoder that the system ``name`` answers with."""
    made: list[Decoder] = []
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "answer", lambda engine, *_, **__: made.append(engine.decoder))
        baselines.answer(name, of)
    return made[0]


def watch(decoder: Any) -> list[tuple[tuple[Any, ...], Selection]]:
    """Every choice that the decoder makes: what it is given, and the tokens that it keeps."""
    seen: list[tuple[tuple[Any, ...], Selection]] = []

    def noting(choose: Callable[..., Selection]) -> Callable[..., Selection]:
        return lambda *given: seen.append((given, choose(*given))) or seen[-1][1]  # type: ignore[func-returns-value]

    if hasattr(decoder, "plan"):
        decoder.plan = decoder.plan._replace(choose=noting(decoder.plan.choose))
    else:
        decoder.select = noting(decoder.select)
    return seen


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@contextmanager
def blocked(model: Any, drops: dict[int, tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
    """(dropped, kept, vectors) by layer: from there no token sees the dropped ones, the kept ones get their vectors."""

    def before(layer: Any, inputs: Any, options: dict[str, Any]) -> Any:
        hidden, index = inputs[0], layer.self_attn.layer_idx
        if index in drops:
            hidden = hidden.index_copy(1, drops[index][1], drops[index][2][None])
        allowed = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
        for stage, (dropped, _, _) in drops.items():
            if stage <= index:
                allowed[:, dropped] = False
        allowed |= torch.eye(len(allowed), dtype=torch.bool)  # a dropped token may see itself: nobody looks at it
        return (hidden, *inputs[1:]), {**options, "attention_mask": allowed[None, None]}

    held = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in model.model.language_model.layers]
    yield
    for hook in held:
        hook.remove()


@pytest.mark.parametrize("name", [*(f"{name}_100" for name in PRUNERS), *CASES])
def test_leaving_tokens_out_equals_masking_them_at_their_old_positions(deep, name, monkeypatch) -> None:
    """Also what is written after them: five rows of different lengths in one batch, against one masked row each."""
    of, before = job(deep), hooks(deep.model)
    decoder = pruned_decoder(of, name, monkeypatch)
    chosen, stages = watch(decoder), list(decoder.plan.shares) if name.startswith(INSIDE) else [0]
    output = decoder.start(*prompts(deep, of))
    assert len(chosen) == 5 * len(stages) and stages == {"fastv_50": [1]}.get(name, stages)
    assert hooks(deep.model) == before and type(of.engine.decoder) is Decoder
    shares = [kept.nominal / full for kept, full in zip(output.kept, [48, 50, 40, 64, 42], strict=True)]
    assert shares == pytest.approx([float(name.rpartition("_")[2]) / 100] * 5, abs=0.02)
    for row, written in enumerate(output.tokens):
        batch, drops = single(deep, of, row), {}
        left = batch["mm_token_type_ids"][0].nonzero().flatten()
        for number, stage in enumerate(stages):
            selection = chosen[5 * number + row][1]
            kept = left[selection.kept]
            drops[stage] = (left[~torch.isin(left, kept)], kept, selection.vectors)
            left = kept
        length = batch["input_ids"].shape[1]
        last = batch["position_ids"][..., -1:]
        batch["position_ids"] = torch.cat([batch["position_ids"], last + torch.arange(1, len(written) + 1)], dim=2)
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([written])], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with torch.no_grad(), blocked(deep.model, drops):
            logits = deep.model(**batch, use_cache=False).logits[0, length - 1 : -1].float()
        logits[:, decoder.config.suppress_tokens] = float("-inf")
        assert (output.first_logits[row] - logits[0]).abs().nan_to_num().max() < 1e-4
        assert logits.argmax(dim=-1).tolist() == written or output.margins[row] < TIE


def test_scores_are_the_last_blocks_attention_in_raster_order(deep, monkeypatch) -> None:
    """Against the whole maps, noted by an attention function registered with transformers, un-permuted by hand."""
    maps: list[tuple[Any, Tensor]] = []

    def noting(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        weights = torch.softmax(query @ key.transpose(2, 3) * options["scaling"], dim=-1)
        maps.append((module, weights[0]))
        return (weights @ value).transpose(1, 2), weights

    of, visual = job(deep), deep.model.model.visual
    decoder = pruned_decoder(of, "visionzip_50", monkeypatch)
    views = watch(decoder)
    monkeypatch.setattr(pruning, "QUERIES", 50)  # queries at a time
    decoder.start(*prompts(deep, of))
    AttentionInterface.register("noting", noting)
    monkeypatch.setattr(visual.config, "_attn_implementation", "noting")
    decoder._encode([[image] for image in of.rows["image"]])
    last = [weights for module, weights in maps if module is visual.blocks[-1].attn]
    assert len(last) == len(views) == 5
    for ((view,), _), weights, (width, height) in zip(views, last, SIZES, strict=True):
        rows, columns = height // 28, width // 28
        windows = itertools.product(range(0, rows, 4), range(0, columns, 4))
        places = torch.arange(rows * columns).view(rows, columns)
        order = torch.cat([places[top : top + 4, left : left + 4].flatten() for top, left in windows])
        assert (order.diff() < 0).any()
        raster = torch.empty(rows * columns)
        raster[order] = weights.mean(dim=0).sum(dim=0).view(-1, 4).mean(dim=1)
        assert torch.allclose(view.scores, raster, atol=1e-4)


def test_raters_and_last_token_are_those_of_the_whole_attention_map(deep, monkeypatch) -> None:
    """The weights handed to the choice, against eager attention of the layer before, recorded by transformers."""
    of, plain = job(deep), deep.model.config._attn_implementation
    decoder = pruned_decoder(of, "fastv_50", monkeypatch)
    chosen = watch(decoder)
    decoder.start(*prompts(deep, of))
    deep.model.set_attn_implementation("eager")
    for row, (given, _) in enumerate(chosen):
        batch = single(deep, of, row)
        with torch.no_grad():
            maps = deep.model(**batch, output_attentions=True).attentions
        types = batch["mm_token_type_ids"][0].bool()
        text = int(types.nonzero().max()) + 1  # the image's last token itself is no text
        assert torch.allclose(given[0], maps[0][0].mean(dim=0)[text:][:, types], atol=1e-5)
    deep.model.set_attn_implementation(plain)


@pytest.mark.parametrize("name", PRUNERS)
def test_tokens_are_counted_by_row_whatever_the_batch(deep, name) -> None:
    of, single = job(deep, count=8), job(deep, count=8, token_budget=1)
    done, alone, plain = baselines.answer(f"{name}_70", of), baselines.answer(f"{name}_70", single), job(deep, count=8)
    for one, other, full in zip(done, alone, baselines.answer("full", plain), strict=True):
        assert one.row_id == other.row_id and one.turns[0] == other.turns[0]
        assert one.answer == other.answer or one.margin < TIE
        assert one.rtr == pytest.approx(0.7, abs=0.02) and one.full_visual_tokens == full.visual_tokens
        assert one.layer_rtr == pytest.approx((1 + 6 * one.rtr) / 7 if name == "fastv" else 0.7, abs=0.02)
        assert full.layer_rtr == full.rtr == 1 and Trajectory.from_dict(one.to_dict()) == one
        left = of.left[one.row_id]
        assert left == sorted(set(left)) and 0 <= left[0] and left[-1] < one.full_visual_tokens
        assert len(left) == one.visual_tokens if name != "sparsevlm" else len(left) < one.visual_tokens
    assert set(of.left) == set(of.rows["id"])


def test_the_evidence_that_is_left_is_counted_in_tokens_that_touch_its_boxes(tiny) -> None:
    """A grid of 2 x 4 tokens; the boxes touch token 0 and, of the second row, tokens 5 and 6."""
    rows: dict[str, list[Any]] = {"id": ["a", "b"], "image": [tiny.noise(112, 56, 0), tiny.noise(56, 56, 1)]}
    rows |= {"question_boxes": [[[0, 0, 250, 500]], []], "answer_boxes": [[[260, 510, 740, 990]], []]}
    of = SystemJob(Engine(tiny.model, tiny.processor, max_new_tokens=2), rows, left={"a": [0, 1, 2, 6], "b": [3]})
    found = baselines.shares_left(of)
    assert found.left.tolist() == [0.5, 0.25]
    assert found.evidence[0] == pytest.approx(2 / 3) and math.isnan(found.evidence[1])


def test_random_crops_cost_what_the_policys_do_and_oracle_crops_are_the_labels(tiny) -> None:
    of = job(tiny, count=6)
    wanted = [("top-left",), (), ("top", "center"), ("all",), ("left",), ("bottom-right", "top-right")]
    made = of.engine.run(of.rows["image"], of.rows["question"], forced=wanted, row_ids=of.rows["id"])

    def drawn(policy: Any, seed: int = 0) -> list[tuple[str, ...]]:
        return [one.crops for one in baselines.answer("random_crop", SystemJob(of.engine, of.rows, policy, seed))]

    assert [list(map(crops.area, names)) for names in drawn(made)] == [list(map(crops.area, names)) for names in wanted]
    assert sum(map(operator.ne, drawn(made), wanted)) >= 2 and all(len({*names}) == len(names) for names in drawn(made))
    assert drawn(made) == drawn(made) != drawn(made, seed=5)
    for policy in (made[::-1], None):
        with pytest.raises(AwaresError, match="random_crop"):
            drawn(policy)
    with pytest.raises(AwaresError, match="row x: .*'100,200,300,410'"):
        baselines._random_crops(["100,200,300,410"], "x", 0)
    labelled = of.rows | {"label": ["HR", "LR"] * 3, "target_crops": [["left"], ["all"], ["top", "center"]] * 2}
    done = baselines.answer("oracle_crop", SystemJob(of.engine, labelled))
    assert [one.crops for one in done] == [("left",), (), ("top", "center"), (), ("all",), ()]
    with pytest.raises(AwaresError, match="oracle_crop.*label_rows"):
        baselines.answer("oracle_crop", of)


@pytest.mark.parametrize(
    "name, named",
    [
        ("vision_zip_50", "visionzip, holov"), ("nosuch", "full, half"), ("fastv", "fastv_50"), ("fastv_0", "fastv_50"),
        ("holov_101", "holov_50"), ("full_50", "write full"), ("sparsevlm_50", r"above 0\.5"),
    ],
)  # fmt: skip
def test_an_unknown_name_and_a_bad_ratio_are_named(tiny, name, named) -> None:
    with pytest.raises(AwaresError, match=named):
        baselines.answer(name, job(tiny, count=1))
    names = {"random_token_36.4": 0.364, "fastv_100": 1.0, "random_crop": None, "sft": None}
    assert {name: baselines.parse(name)[1] for name in names} == pytest.approx(names)
    assert [baselines.weights_of(name) for name in names] == ["base", "base", "awares", "sft"]


def test_every_compared_system_is_known_and_a_pruner_can_keep_as_much_as_the_policy():
    systems = {"system": ["awares", "awares", "full"], "benchmark": ["pope", "average", "average"]}
    main = pd.DataFrame(systems | {"rtr": [0.3, 0.3642, 1]})
    assert baselines.matched("visionzip_awares", main) == "visionzip_36.4"
    assert baselines.matched("visionzip_50", main) == "visionzip_50"
    assert baselines.parse(baselines.matched("random_token_awares", main))[1] == pytest.approx(0.364)
    for name in load_params("mini").comparison.systems:
        baselines.parse(baselines.matched(name, main))


def test_a_system_of_your_own_is_a_function_or_a_file(tiny, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "_functions", dict(system._functions))
    monkeypatch.setattr(systems, "__path__", [str(tmp_path)])

    @system("pale")
    def pale(of: SystemJob, ratio: float = 0.5) -> list[Trajectory]:
        dim = [ImageEnhance.Contrast(image).enhance(ratio) for image in of.rows["image"]]
        return of.engine.answer(dim, of.rows["question"], row_ids=of.rows["id"])

    (tmp_path / "dull.py").write_text(
        "from awares.registry import system\n\n\n@system('dull', model='sft')\ndef dull(job):\n"
        "    return job.engine.answer(job.rows['image'], job.rows['question'], 'half', row_ids=job.rows['id'])\n"
    )
    of = job(tiny, count=2)
    for wanted in ("pale_25", pale, "dull"):
        assert [one.row_id for one in baselines.answer(wanted, of)] == of.rows["id"]
    assert (baselines.weights_of("dull"), baselines.weights_of(pale)) == ("sft", "base")
    (tmp_path / "misnamed.py").write_text("x = 1\n")
    with pytest.raises(AwaresError, match="misnamed"):
        baselines.parse("misnamed")
