"""How the embedded base model learns to look things up: a code, two layers that match and copy, and a watch on where they look.

A question about a picture takes three hops: what is asked about, which visual token holds its value, and the value itself. None of them pays
without the others, so a small model trained on answers alone learns which answers are usual and never looks. Three aids make each hop
pay by itself:

- *The code* (`Code`) is what the vision tower is taught to write into a visual token: what stands there, and whose value it is, in directions of
  their own for either row of patches. So the language tower can be trained on symbolic pages, without a vision tower, while that one learns to read.
- *Two layers begin as a look-up* (`prepare`): one copies the subject of the question to where the answer starts; the other matches it with
  the "whose value" part of the code and copies the "what stands there" part. All other weights begin at random.
- *The watch* (`Watch`) adds to the loss how much attention these layers give to the subject and to the evidence.

All of it is base training; the trained model is a plain Qwen2.5-VL.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from awares import lexicon as lex
from awares.base import SUBJECTS, WORDS

SUBJECT_LAYER, VALUE_LAYER = 1, 3
ROWS = 2  # of patches in a visual token
SPREAD = 2.0  # standard deviation of an embedding's entries: large, so that early layers cannot drown the code


class Code:
    """A visual token as the sum of what stands on its patches, after two rotations a row: of whose value it is, and of what it is."""

    def __init__(self, tokenizer: Qwen2Tokenizer, width: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.embedding = SPREAD * torch.randn(len(tokenizer), width, generator=draw)  # (V, D)
        turns = [torch.linalg.qr(torch.randn(width, width, generator=draw))[0] for _ in range(2 * ROWS + 1)]
        self.subject_turns, self.own_turns, self.answer_turn = turns[:ROWS], turns[ROWS : 2 * ROWS], turns[-1]  # (D, D)
        self.words = self._table(tokenizer, WORDS)
        self.colours = self._table(tokenizer, list(lex.COLOURS))
        self.subjects = self._table(tokenizer, SUBJECTS)

    def _table(self, tokenizer: Qwen2Tokenizer, words: list[str]) -> torch.Tensor:
        """(1 + words, D): nothing, then each word as the mean of its tokens with and without a space before it."""
        rows = [torch.zeros(self.embedding.shape[1])]
        for word in words:
            forms = [tokenizer(f, add_special_tokens=False)["input_ids"] for f in (word, f" {word}")]
            rows.append(self.embedding[[ids[0] for ids in forms if len(ids) == 1]].mean(0))
        return torch.stack(rows)

    def __call__(self, words: torch.Tensor, colours: torch.Tensor, links: torch.Tensor) -> torch.Tensor:
        """Ids per patch, in the processor's order, to tokens: (N, 4), (N, 4), (N, 4, LINKS) -> (N, D). What is not known counts as nothing."""
        half = words.shape[1] // ROWS
        code = torch.zeros(len(words), self.embedding.shape[1])
        for row in range(ROWS):
            patches = slice(row * half, (row + 1) * half)
            subjects = self.subjects[links[:, patches].clamp(min=0)].sum((1, 2))
            own = self.words[words[:, patches].clamp(min=0)].sum(1) + self.colours[colours[:, patches].clamp(min=0)].sum(1)
            code = code + subjects @ self.subject_turns[row] + own @ self.own_turns[row]
        return code / ROWS

    def distance(self, found: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """Squared distance of tokens (N, D) to their code, in units of half an embedding: (N,)."""
        return 2 * (found - code).square().sum(-1) / (self.embedding.shape[1] * SPREAD**2)
