"""Other bases through the same code: tiny random models of the published classes, saved, loaded, sampled, trained."""

import contextlib
from types import SimpleNamespace

import pytest
import test_grpo
import test_sft
import torch
from conftest import TOOL_TOKENS, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from awares.engine import chat_format
from awares.engine.model import ImageOnlyProcessor, load_model, load_processor, save_model
from awares.method import protocol, sft
from awares.method.rollout import Engine
from awares.training import prompt_sharing as sharing

CALLS = [("top-left",), (), ("center", "right"), ("all",)]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def published(tools):
    """A tokenizer like the published ones: byte-level BPE with merges, the same split into words and tool tokens."""
    core, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    texts = [protocol.SYSTEM, "<tool_response>\n</tool_response>", "what is the word?", "user assistant system"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return tiny_tokenizer(tools, (), core)


QWEN3 = {"kind": (Qwen3VLConfig, Qwen3VLForConditionalGeneration), "head_dim": 16, "mrope": [4, 2, 2]}
QWEN3["vision"] = {"depth": 3, "patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
BASES = {  # 3B ties its embeddings and has 16 heads on 2; 72B has 64 on 8; Qwen3's tower feeds the first layers, too
    "qwen2.5-vl-3b": {"num_attention_heads": 16, "mrope": [0, 1, 1], "tied": True},
    "qwen2.5-vl-72b": {"num_attention_heads": 8, "num_key_value_heads": 1, "mrope": [2, 1, 1]},
    "qwen3-vl": QWEN3,
}


def build(name, tokenizer):
    """Model and processor of BASES."""
    chat_format.install(tokenizer)
    patch = 16 if name == "qwen3-vl" else 14
    size = {"shortest_edge": 4 * patch * patch, "longest_edge": 2000 * 2000}
    processor = ImageOnlyProcessor(Qwen2VLImageProcessorPil(patch_size=patch, size=size), tokenizer)
    return tiny_model(processor, layers=3, hidden_size=64, **BASES[name]), processor


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    """The folder of a saved model. Qwen2.5 has no token for <tool_response>: it is text."""
    folder = tmp_path_factory.mktemp("bases") / request.param
    tools = TOOL_TOKENS if request.param == "qwen3-vl" else chat_format.TOOL_TOKENS
    save_model(*build(request.param, published(tools)), folder)
    return folder


def test_two_turns_with_a_reused_cache_equal_two_turns_from_nothing(base, tiny):
    engine = Engine(load_model(base), load_processor(base), max_new_tokens=12)
    images = [tiny.noise(256, 192, n) for n in range(4)]
    questions = [f"what is {n}?" for n in range(4)]
    reused = engine.run(images, questions, forced=CALLS)
    engine.reuse = False
    fresh = engine.run(images, questions, forced=CALLS)
    assert [one.answer for one in reused] == [one.answer for one in fresh]
    assert [one.crops for one in reused] == CALLS
    assert [one.margin for one in reused] == pytest.approx([one.margin for one in fresh], abs=1e-4)
    assert len({round(one.margin, 4) for one in reused}) == 4
    side = 2 * engine.processor.image_processor.patch_size
    assert reused[1].visual_tokens == round(128 / side) * round(96 / side)


@pytest.fixture(scope="module")
def rows(tiny):
    """Eight curated rows, every second one HR, with one question about their pictures, which must not be mixed up."""
    rows = tiny.rows([(256, 192)], [[], ["top"], [], ["right", "top-left"]] * 2)
    return rows.remove_columns("question").add_column("question", ["what is the word?"] * 8)


def gradients(trainer):
    return {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def assert_same(found):
    """Trainings with (True) and without (False) short cuts found the same values, and not nothing."""
    assert found[True].keys() == found[False].keys() and any("language_model" in name for name in found[False])
    for name, value in found[False].items():
        assert value.abs().max() > 0
        torch.testing.assert_close(found[True][name], value, atol=1e-4, rtol=2e-3)


def test_the_cold_start_shares_computation_without_changing_the_update(base, rows, tmp_path):
    """Loss and gradients of a whole micro-batch, with profile mini's short cuts and as profile paper runs it."""
    world, found = SimpleNamespace(base=base, rows=rows, processor=load_processor(base)), {}
    for share in (True, False):
        params = test_sft.settings(**{"sft.share_computation": share})
        samples = [sft.Sample(n, kind, 0) for n, kind in enumerate(["direct", "trajectory", "direct", "trajectory"])]
        trainer = test_sft.trainer_for(world, params, tmp_path / str(share), samples)
        test_grpo.disturb(trainer)
        core = trainer.model.get_base_model()
        with sharing.vision_memo(core) if share else contextlib.nullcontext():
            for _ in range(2):  # the second time the pictures are known
                trainer.model.zero_grad()
                loss = trainer.compute_loss(trainer.model, test_sft.collate(trainer, 4))
                loss.backward()
        found[share] = {"loss": loss.detach(), **gradients(trainer)}
    assert_same(found)


def test_grpo_shares_computation_without_changing_the_update(base, rows, tmp_path):
    world = SimpleNamespace(policy=base, rows=rows)
    trainer, found = test_grpo.trainer_for(world, tmp_path, test_grpo.settings()), {}
    test_grpo.disturb(trainer)
    test_grpo.write(trainer)
    batch = test_grpo.rollouts(trainer)
    for share in (True, False):
        trainer.model.zero_grad()
        with sharing.vision_memo(trainer.model.get_base_model()) if share else contextlib.nullcontext():
            for _ in range(2):
                logps, entropies, _ = test_grpo.log_probs(trainer, batch, share)
        (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
        found[share] = {"logps": logps.detach(), "entropies": entropies.detach(), **gradients(trainer)}
    assert_same(found)


def test_both_trainings_run_and_the_policy_answers(base, rows, tmp_path):
    world = SimpleNamespace(base=base, rows=rows)
    cold = test_sft.run(world, tmp_path / "sft" / "main-s1", **{"protocol.max_new_tokens": 48})
    done = test_grpo.run(SimpleNamespace(policy=cold.merged, rows=rows), tmp_path / "grpo" / "main-s1")
    assert done.step == 3 and load_file(done.adapter / "adapter_model.safetensors")
    engine = Engine(load_model(done.merged), load_processor(done.merged), max_new_tokens=4)
    assert engine.run(rows["image"][:2], rows["question"][:2], forced=CALLS[:2])[0].crops == CALLS[0]
