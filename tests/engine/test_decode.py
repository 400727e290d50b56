"""Decoding: a second turn from the cache equals recomputation, alone and in batches."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from test_rollout import TIE
from torch import Tensor

from awares.engine import decode
from awares.engine.decode import Decoder
from awares.method import protocol


def same(a: list[int], b: list[int], margin: float) -> bool:
    return a == b or margin < TIE


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two sets of logits; suppressed tokens are minus infinity in both."""
    assert torch.equal(torch.isinf(a), torch.isinf(b))
    return (a - b).nan_to_num().abs().max().item()


def random_images(tiny: SimpleNamespace, rng: np.random.Generator, count: int) -> list[Image.Image]:
    sides = rng.integers(1, 5, (count, 2)) * 28
    return [tiny.noise(int(width), int(height), int(rng.integers(1 << 30))) for width, height in sides]


def prompt_ids(tiny: SimpleNamespace, decoder: Decoder, question: str, image: Image.Image) -> list[int]:
    messages = protocol.messages(question, None)
    text = tiny.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return decoder.tokenize(text, [image.size])


def suffix_ids(tiny: SimpleNamespace, decoder: Decoder, images: list[Image.Image]) -> list[int]:
    message = protocol.OURS.reply([None] * len(images), None if images else protocol.TOOL_ERROR)
    return decoder.tokenize(protocol.tool_suffix(tiny.processor, message), [image.size for image in images])


def test_positions_of_another_batch_do_not_leak_in(tiny: SimpleNamespace) -> None:
    decoder, image = Decoder(tiny.model, tiny.processor, max_new_tokens=4), tiny.noise(84, 56, 0)
    first, suffix = decoder.start([prompt_ids(tiny, decoder, "q", image)], [[image]]), suffix_ids(tiny, decoder, [])
    fresh = decoder.extend(first.state, [0], [suffix], [[]], reuse=False)
    tiny.model.model.rope_deltas = torch.tensor([[-40]])
    assert difference(decoder.extend(first.state, [0], [suffix], [[]]).first_logits, fresh.first_logits) < 1e-4


def test_the_model_cannot_write_an_image_placeholder(tiny: SimpleNamespace) -> None:
    decoder, image = Decoder(tiny.model, tiny.processor, max_new_tokens=3), tiny.noise(56, 56, 0)
    decoder.call_token = tiny.processor.image_token_id
    output = decoder.start([prompt_ids(tiny, decoder, "q", image)], [[image]], call_bias=[99.0])
    assert tiny.processor.image_token_id not in output.tokens[0]


def test_a_batch_passes_the_common_beginning_through_the_model_once(tiny: SimpleNamespace, monkeypatch) -> None:
    """The result equals that of padding: first logits, tokens, and what a second turn makes of the cache."""
    rng, decoder = np.random.default_rng(3), Decoder(tiny.model, tiny.processor, max_new_tokens=5)
    images = [[image] for image in random_images(tiny, rng, 6)]
    rows = [prompt_ids(tiny, decoder, "q" * int(rng.integers(1, 40)), row[0]) for row in images]
    new = [random_images(tiny, rng, count) for count in (1, 2)]
    suffixes = [suffix_ids(tiny, decoder, crop_images) for crop_images in new]
    fed: list[int] = []
    embed = tiny.model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda module, inputs, output: fed.append(inputs[0].numel()))
    shared = decoder.start(rows, images)
    saved = fed[:]
    after = decoder.extend(shared.state, [4, 1], suffixes, new)
    monkeypatch.setattr(decode, "SHARE_FROM", 10**9)
    fed.clear()
    padded = decoder.start(rows, images)
    hook.remove()
    common = rows[0].index(tiny.processor.image_token_id)
    assert saved[0] == common and saved[0] + saved[1] == fed[0] - 5 * common
    assert difference(shared.first_logits, padded.first_logits) < 1e-4
    assert all(map(same, shared.tokens, padded.tokens, padded.margins))
    fresh = decoder.extend(padded.state, [4, 1], suffixes, new, reuse=False)
    assert difference(after.first_logits, fresh.first_logits) < 1e-4
