"""Other bases through the same code: tiny random models of the published classes, saved, loaded, sampled, trained."""

import contextlib
from types import SimpleNamespace

import pytest
import test_grpo
import test_sft
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from awares.baselines import registry as baselines
from awares.engine import chat_format
from awares.engine.model import ImageOnlyProcessor, load_model, load_processor, save_model
from awares.errors import AwaresError
from awares.method import protocol, sft
from awares.method.rollout import Engine
from awares.training import prompt_sharing as sharing

# The added tokens of the published tokenizers, in the order of their ids; those without bars are not special
MARKS = "object_ref_start object_ref_end box_start box_end quad_start quad_end".split()
MARKS += "vision_start vision_end vision_pad image_pad video_pad".split()
CODE = "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep".split()
QWEN2_5 = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", *MARKS)] + ["<tool_call>", "</tool_call>"]
QWEN2_5 += [f"<|{name}|>" for name in CODE]
QWEN3 = [*QWEN2_5, "<tool_response>", "</tool_response>", "<think>", "</think>"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def published(added):
    """A tokenizer like the published ones: byte-level BPE with merges, the same split into words and added tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [protocol.SYSTEM, "<tool_response>\n</tool_response>", "what is the word?", "user assistant system"] * 4
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    for token in added:
        kind = AddedToken(token, normalized=False, special="|" in token)
        (core.add_special_tokens if kind.special else core.add_tokens)([kind])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 8192}


def ids(tokenizer):
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def qwen2_5(tokenizer, heads, key_heads, tied):
    """3B ties its embeddings and has 16 heads on 2; 72B has 64 on 8."""
    text = dict(
        **TEXT, vocab_size=len(tokenizer), num_attention_heads=heads, num_key_value_heads=key_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [64 // heads // 2 - 2, 1, 1]},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1],
        window_size=112,
    )  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids(tokenizer))
    return Qwen2_5_VLForConditionalGeneration(config), 14


def qwen3(tokenizer):
    """Patches of 16 px, and vision features for the first layers of the language model."""
    text = dict(
        **TEXT, vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
    )  # fmt: skip
    vision = dict(
        depth=3, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, patch_size=16,
        num_position_embeddings=256, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids(tokenizer))
    return Qwen3VLForConditionalGeneration(config), 16


BASES = {
    "qwen2.5-vl-3b": lambda tokenizer: qwen2_5(tokenizer, 16, 2, True),
    "qwen2.5-vl-72b": lambda tokenizer: qwen2_5(tokenizer, 8, 1, False),
    "qwen3-vl": qwen3,
}


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    """The folder of a saved model."""
    torch.manual_seed(0)
    tokenizer = published(QWEN3 if request.param == "qwen3-vl" else QWEN2_5)
    chat_format.install(tokenizer)
    model, patch = BASES[request.param](tokenizer)
    with torch.no_grad():  # at 0.02 a random model is almost blind to its input
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.6 if "embed_tokens" in name else weight[0].numel() ** -0.5)
    pictures = Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": 4 * patch * patch, "longest_edge": 2000 * 2000}
    )
    folder = tmp_path_factory.mktemp("bases") / request.param
    save_model(model, ImageOnlyProcessor(pictures, tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def engine(base):
    return Engine(load_model(base), load_processor(base), max_new_tokens=12)


CALLS = [("top-left",), (), ("center", "right"), ("all",)]


def test_the_published_tokenizer_is_taken_as_it_is(base):
    """Qwen2.5 has no token for <tool_response>: it is text, and reads back as what it is."""
    tokenizer = load_processor(base).tokenizer
    assert ("<tool_response>" in tokenizer.get_vocab()) == (base.name == "qwen3-vl")
    text = tokenizer.apply_chat_template(protocol.messages("what?", None, ("top",), answer="4"), tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and text.count("<tool_response>") == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<tool_call>")) == 1


def test_two_turns_with_a_reused_cache_equal_two_turns_from_nothing(engine, tiny):
    images = [tiny.noise(256, 192, n) for n in range(4)]
    questions = [f"what is {n}?" for n in range(4)]
    reused = engine.run(images, questions, forced=CALLS)
    engine.reuse = False
    fresh = engine.run(images, questions, forced=CALLS)
    engine.reuse = True
    assert [one.answer for one in reused] == [one.answer for one in fresh]
    assert [one.crops for one in reused] == CALLS
    assert [one.margin for one in reused] == pytest.approx([one.margin for one in fresh], abs=1e-4)
    assert len({round(one.margin, 4) for one in reused}) == 4
    side = 2 * engine.processor.image_processor.patch_size
    assert reused[1].visual_tokens == round(128 / side) * round(96 / side)


@pytest.fixture(scope="module")
def rows(tiny):
    """Eight curated rows, every second one HR."""
    return tiny.rows([(256, 192)], [[], ["top"], [], ["right", "top-left"]] * 2)


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
    cold = test_sft.run(
        SimpleNamespace(base=base, rows=rows), tmp_path / "sft" / "main-s1", **{"protocol.max_new_tokens": 48}
    )
    done = test_grpo.run(SimpleNamespace(policy=cold.merged, rows=rows), tmp_path / "grpo" / "main-s1")
    assert done.step == 3 and load_file(done.adapter / "adapter_model.safetensors")
    engine = Engine(load_model(done.merged), load_processor(done.merged), max_new_tokens=4)
    assert engine.run(rows["image"][:2], rows["question"][:2], forced=CALLS[:2])[0].crops == CALLS[0]


@pytest.mark.parametrize("name", ["visionzip_50", "fastv_50"])
def test_a_pruner_refuses_what_it_is_not_written_for(engine, rows, name):
    """Attention, windows and rotary positions of the vision tower are read as Qwen2.5-VL has them."""
    job = baselines.SystemJob(engine, rows.select(range(2)))
    if engine.decoder.model.config.model_type == "qwen2_5_vl":
        assert [one.rtr for one in baselines.answer(name, job)] == pytest.approx([0.5, 0.5], abs=0.02)
    else:
        with pytest.raises(AwaresError, match="written for Qwen2.5-VL, not for qwen3_vl"):
            baselines.answer(name, job)
