"""Fixtures: a random tiny Qwen2.5-VL with a byte-level tokenizer, built in a second, so no test needs a checkpoint."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from awares.config import Params, load_params
from awares.data.rows import make_dataset
from awares.engine import chat_format
from awares.engine.model import load_model, make_processor, save_model
from awares.method.crops import CROPS
from awares.method.rollout import Trajectory, Turn
from awares.settings import Task

ROOT = Path(__file__).resolve().parents[1]
os.environ.pop("AWARES_API_KEY", None)  # of the user
os.environ["NO_PROXY"] = "127.0.0.1"
openai._base_client.INITIAL_RETRY_DELAY = 0.01  # seconds
TASKS = get_args(Task)  # the benchmarks
# As Qwen3 has them; test_bases has Qwen2.5's
TOOL_TOKENS = (*chat_format.TOOL_TOKENS, "<tool_response>", "</tool_response>")
LONG = ('{"name": "crop", "arguments": {"regions": ["', '", "', '"]}}', *CROPS)  # a call is ten tokens
QWEN2_5 = (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)


def tiny_tokenizer(tools=TOOL_TOKENS, long=LONG, core: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges (256 bytes) or ``core``, with Qwen's special tokens, and ``tools`` and ``long``."""
    if core is None:
        vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in chat_format.SPECIAL_TOKENS])
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in (*tools, *long)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def tiny_model(processor, seed=0, layers=2, kind=QWEN2_5, mrope=(1, 1, 2), vision=None, tied=False, **text) -> Any:
    """Width 32, vision tower of two blocks; weights large enough that logits differ clearly. ``text``: other sizes."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*mrope]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    ends = {"bos_token_id": None, "eos_token_id": token_id("<|im_end|>"), "pad_token_id": token_id("<|endoftext|>")}
    sizes: dict[str, Any] = {"vocab_size": len(processor.tokenizer), "hidden_size": 32, "intermediate_size": 64}
    sizes |= {**heads, **ends, "num_hidden_layers": layers, "tie_word_embeddings": False, **text}
    tower: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "window_size": 112}
    tower |= {"out_hidden_size": sizes["hidden_size"], "fullatt_block_indexes": [1], **(vision or {})}
    marks = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": token_id(f"<|{token}|>") for name, token in marks.items()}
    text_config = {**sizes, "rope_parameters": rope}
    config = kind[0](text_config=text_config, vision_config=tower, tie_word_embeddings=tied, **ids)
    torch.manual_seed(seed)
    model = kind[1](config).eval()
    with torch.no_grad():  # the default spread of 0.02 leaves a random model almost blind to its input
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.6 if "embed_tokens" in name else weight[0].numel() ** -0.5)
            if "q_proj" in name or "k_proj" in name or "qkv" in name:
                weight.mul_(2.0)
    model.generation_config.eos_token_id = token_id("<|im_end|>")
    model.generation_config.pad_token_id = token_id("<|endoftext|>")
    return model


def overriding(values: dict[str, Any]) -> Callable[..., Params]:
    """A function that loads params.yaml with ``values``, and with those that it is given."""
    return lambda **more: load_params(overrides={**values, **more})


def noise(width: int, height: int, seed: int) -> Image.Image:
    """An image of coloured 8 px blocks, different for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), dtype=np.uint8))[:height, :width])


def curated_rows(sizes, crops, answers=()):
    """Curated rows with images of ``sizes`` in turn, one for each of ``crops``: HR where it names regions, else LR."""
    plain = {"source": "chartqa", "question_boxes": [], "answer_boxes": [], "split": "train"}
    rows = make_dataset(
        {"id": f"r{i}", "image": noise(*sizes[i % len(sizes)], seed=i), "question": f"what is the {'big ' * i}word?"}
        | {"answers": [f"word {i}", *answers], **plain}
        for i in range(len(crops))
    )
    labelled = rows.add_column("label", ["HR" if names else "LR" for names in crops])
    return labelled.add_column("target_crops", list(crops))


def trajectory(row_id="row-0", answer="12", crops=(), status="", tokens=16, text=None) -> Trajectory:
    """What a system did with a row of 64 visual tokens; ``text``: what it wrote, if not the ``answer`` alone."""
    written = Turn("assistant", answer if text is None else text, (), 0, 2)
    turns = Turn("user", "q", ((112, 112),), tokens, 9), written
    status = status or ("valid" if crops else "none")
    return Trajectory(row_id, answer, tuple(crops), status, turns, tokens, 64, 0.1, 1.0)


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """``model``, ``processor``, ``noise(width, height, seed)`` -> image, and `curated_rows` as ``rows``."""
    torch.set_num_threads(1)
    processor = make_processor(tiny_tokenizer())
    return SimpleNamespace(model=tiny_model(processor), processor=processor, noise=noise, rows=curated_rows)


@pytest.fixture(scope="session")
def saved(tiny, tmp_path_factory):
    """The folder of ``tiny``, to read only."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    save_model(tiny.model, tiny.processor, folder)
    return folder


def save_adapter(model, folder, seed):
    """A random adapter of the model in the folder ``model``."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_model(model), lora).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def deep(tiny: SimpleNamespace) -> SimpleNamespace:
    """``tiny`` with a language model of seven layers, for what happens between them."""
    return SimpleNamespace(model=tiny_model(tiny.processor, layers=7), processor=tiny.processor, noise=noise)
