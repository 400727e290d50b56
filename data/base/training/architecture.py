"""Architecture of the embedded base model (data/base/config.json), and the ids of its dense targets."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

from awares.mini import vocabulary as lex

BASE = Path(__file__).parents[1]  # the folder of the shipped model
PATCH, TOKEN = 14, 28  # px
CHARS = "abcdefghijklmnopqrstuvwxyz0123456789$%:"
_LISTS = [*lex.THEMES.values(), *lex.WORD_VALUES.values(), lex.SHOP, list(lex.SHAPES)]
WORDS = sorted({w for words in _LISTS for w in words} | {str(n) for n in range(100)} | {"kg", "sign"})
WORD_ID = {w: i + 1 for i, w in enumerate(WORDS)}  # 0 = nothing here
SUBJECTS = [*WORDS, *lex.COLOURS]
SUBJECT_ID = {w: i + 1 for i, w in enumerate(SUBJECTS)}
CHAR_ID = {c: i + 1 for i, c in enumerate(CHARS)}
TRAITS = [*lex.COLOURS, "%", "$"]  # the colour of an object, or the unit of a printed number
TRAIT_ID = {t: i + 1 for i, t in enumerate(TRAITS)}
IGNORE = -100
LINKS = 2  # words that lead to a value


def load_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """The shipped configuration, for the vocabulary of ``tokenizer``."""
    config = Qwen2_5_VLConfig.from_pretrained(BASE)
    config.text_config.vocab_size = len(tokenizer)  # type: ignore[union-attr]
    return config


class DenseHeads(torch.nn.Module):
    """Heads on 14 px patches (word, trait, links) and on 7 px cells (glyph); used in base training only.

    Glyphs are read half-way up the vision tower, words before its last block, which can then carry them to their values.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.glyphs = torch.nn.Linear(width, 4 * (len(CHARS) + 1))
        self.early = torch.nn.Linear(width, len(WORDS) + 1)
        self.words = torch.nn.Linear(width, len(WORDS) + 1)
        self.traits = torch.nn.Linear(width, len(TRAITS) + 1)
        self.links = torch.nn.Linear(width, LINKS * (len(SUBJECTS) + 1))
