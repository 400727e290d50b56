"""The tokenizer of the embedded base model: a byte-level BPE with Qwen's special tokens."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from awares.mini import vocabulary as lex
from examples import text_example
from targets import WORDS

_BARS = "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad".split()
_TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
SPECIALS = [*(f"<|{name}|>" for name in _BARS), *_TAGS]
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
OTHER_WORDS = (
    "violet rose dark upper lower left right middle top bottom all yes no percent dollars kilos "
    "user system assistant tool error such region"
).split()


@lru_cache
def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A BPE trained on the texts of the embedded rows; numbers are split into pairs of digits.

    It is not a `Qwen2Tokenizer`: loading one replaces the saved pattern by Qwen's, which splits digits one by one.
    """
    core = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), letters])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings: dict[str, Any] = {"special_tokens": SPECIALS, "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(_corpus(np.random.default_rng(seed)), trainers.BpeTrainer(vocab_size=2048, **settings))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": SPECIALS}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)


def _corpus(rng: np.random.Generator) -> Iterator[str]:
    for word in [*WORDS, *lex.NUMBER_WORDS, *lex.COLOURS, *lex.PLACES, *OTHER_WORDS, *lex.SYSTEMS] * 40:
        yield from (word, f" {word}")
    for phrasings in lex.PHRASINGS.values():
        for text in phrasings * 40:
            yield text.format(k="", c="", o="", s="", a="", b="")
    for _ in range(2000):
        one = text_example(rng)
        yield "\n".join([one.system, *(part for turn in one.turns for part in turn)])
