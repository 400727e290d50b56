"""How the embedded base model learns to look things up: a code, two layers that match and copy, and a watch on where they look.

A question about a picture takes three hops: what is asked about, which visual token holds its value, and the value itself. None of them pays
without the others, so a small model trained on answers alone learns which answers are usual and never looks. Three aids make each hop
pay by itself:

- *The code* (`Code`) is what the vision tower is taught to write into a visual token: what stands there, and whose value it is, each in a room of
  its own for either row of patches. So the language tower can be trained on symbolic pages, without a vision tower, while that one learns to read.
- *Two layers begin as a look-up* (`prepare`): one copies the subject of the question to where the answer starts; the other matches it with
  the "whose value" part of the code and copies the "what stands there" part. All other weights begin at random.
- *The watches* add to the loss how much attention these layers give to the subject and to the evidence (`Watch`), and how much the last
  block of the vision tower gives, from a value, to what it belongs to (`Glance`).

All of it is base training; the trained model is a plain Qwen2.5-VL.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from architecture import SUBJECTS, TRAITS, WORDS

SUBJECT_LAYER, VALUE_LAYER = 1, 3
ROWS = 2  # of patches in a visual token
SHARPNESS = 24.0  # of `Code.misread`: the logit of a word that fills its room, where an average other word gets 0
SPREAD = 2.0  # standard deviation of an embedding's entries: large, so that early layers cannot drown the code


class Code:
    """A visual token as four rooms of a quarter of its width: for either row of patches, whose value stands there, and what.

    A room is a projection that keeps words apart but has no place for all their directions: a patch of the vision tower has to hold two rooms
    besides its own thoughts, and a merger that only adds up cannot write what no patch can hold.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, width: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.embedding = SPREAD * torch.randn(len(tokenizer), width, generator=draw)  # (V, D)
        self._compose_numbers(tokenizer, torch.Generator().manual_seed(seed + 1))
        turn = lambda rows, columns: torch.linalg.qr(torch.randn(rows, columns, generator=draw))[0]  # noqa: E731
        self.basis = turn(width, width)  # (heads · d, D): the directions of each head
        self.answer_turn = turn(width, width)
        rank = width // (2 * ROWS)
        rooms = turn(width, width).split(rank)  # of a visual token: (D / 4, D) each
        turns = [
            math.sqrt(width / rank) * part.T @ turn(len(part), rank) @ room
            for part, room in zip(2 * self.basis.chunk(ROWS), rooms, strict=True)
        ]
        self.subject_turns, self.own_turns = turns[:ROWS], turns[ROWS:]  # (D, D), of rank D / 4
        self.words = self._table(tokenizer, WORDS)
        self.traits = self._table(tokenizer, TRAITS)
        self.subjects = self._table(tokenizer, SUBJECTS)

    def _compose_numbers(self, tokenizer: PreTrainedTokenizerFast, draw: torch.Generator) -> None:
        """A number is the sum of its tens and its units, as the eye finds it: a merger cannot tell a hundred arbitrary pairs of digits."""
        tens, units = SPREAD * torch.randn(2, 10, self.embedding.shape[1], generator=draw) / math.sqrt(2)
        for number in range(100):
            ids = tokenizer(str(number), add_special_tokens=False)["input_ids"]
            if len(ids) == 1:
                self.embedding[ids[0]] = tens[number // 10] + units[number % 10]

    def _table(self, tokenizer: PreTrainedTokenizerFast, words: list[str]) -> torch.Tensor:
        """(1 + words, D): nothing, then each word as the mean of its tokens with and without a space before it."""
        rows = [torch.zeros(self.embedding.shape[1])]
        for word in words:
            forms = [tokenizer(f, add_special_tokens=False)["input_ids"] for f in (word, f" {word}")]
            rows.append(self.embedding[[ids[0] for ids in forms if len(ids) == 1]].mean(0))
        return torch.stack(rows)

    def __call__(self, words: torch.Tensor, traits: torch.Tensor, links: torch.Tensor) -> torch.Tensor:
        """Ids per patch, in the processor's order, to tokens: (N, 4), (N, 4), (N, 4, LINKS) -> (N, D). What is not known counts as nothing."""
        half = words.shape[1] // ROWS
        code = torch.zeros(len(words), self.embedding.shape[1])
        for row in range(ROWS):
            patches = slice(row * half, (row + 1) * half)
            subjects = self.subjects[links[:, patches].clamp(min=0)].sum((1, 2))
            own = self.words[words[:, patches].clamp(min=0)].sum(1) + self.traits[traits[:, patches].clamp(min=0)].sum(
                1
            )
            code = code + subjects @ self.subject_turns[row] + own @ self.own_turns[row]
        return code / ROWS

    def misread(
        self, found: torch.Tensor, words: torch.Tensor, traits: torch.Tensor, links: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy of naming what stands in each room of tokens (N, D) by the nearest entries of its table, as a look-up does.

        A token may be near its code and yet nearer to another's. Rooms that hold nothing, or something unknown, do not count.
        """
        half, losses = words.shape[1] // ROWS, []
        things = torch.cat([self.words, self.traits[1:]])
        traits = torch.where(traits > 0, traits + len(self.words) - 1, traits)
        for row in range(ROWS):
            patches = slice(row * half, (row + 1) * half)
            own = torch.cat([words[:, patches], traits[:, patches]], 1)
            for ids, table, turn in (
                (links[:, patches].flatten(1), self.subjects, self.subject_turns[row]),
                (own, things, self.own_turns[row]),
            ):
                told = (ids >= 0).all(1) & (ids > 0).any(1)
                if told.any():
                    codes = table[1:] @ turn
                    logits = SHARPNESS * found[told] @ codes.T / codes.square().sum(-1).mean()
                    each = logits.log_softmax(-1).gather(1, (ids[told] - 1).clamp(min=0))
                    stands = ids[told] > 0
                    losses.append(-(each * stands).sum(1) / stands.sum(1))
        return torch.cat(losses).mean() if losses else found.sum() * 0

    def distance(self, found: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """Squared distance of tokens (N, D) to their code, in units of half an embedding: (N,)."""
        return 2 * (found - code).square().sum(-1) / (self.embedding.shape[1] * SPREAD**2)


def prepare(model: Qwen2_5_VLForConditionalGeneration, code: Code) -> None:
    """Set embeddings, head and the two look-up layers of the language tower; each half of the heads reads a row of patches.

    Every head matches and copies its own random directions, so that the heads of a row carry all they have room for.
    """
    language: Any = model.model.language_model
    draw = torch.Generator().manual_seed(1)
    basis = code.basis
    part = basis.chunk(ROWS)

    def turned(turns: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([p @ turn / math.sqrt(2 * ROWS) for p, turn in zip(part, turns, strict=True)])

    def noise(weight: torch.Tensor) -> torch.Tensor:
        return 0.01 * torch.randn(weight.shape, generator=draw)

    with torch.no_grad():
        language.embed_tokens.weight.copy_(code.embedding)
        model.lm_head.weight.copy_(0.075 / SPREAD * code.embedding @ code.answer_turn)
        copy = language.layers[SUBJECT_LAYER].self_attn
        copy.v_proj.weight.copy_(basis)
        copy.o_proj.weight.copy_(2 * basis.T + noise(copy.o_proj.weight))
        look = language.layers[VALUE_LAYER].self_attn
        look.q_proj.weight.copy_(2.5 * basis + noise(look.q_proj.weight))
        look.k_proj.weight.copy_(2.5 * turned(code.subject_turns))
        look.v_proj.weight.copy_(turned(code.own_turns))
        look.o_proj.weight.copy_(5 * (basis @ code.answer_turn).T + noise(look.o_proj.weight))


class Watch:
    """Attention of chosen positions to what they should look at, read off two layers while the model runs."""

    NAME = "sdpa_watched"

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        AttentionInterface.register(self.NAME, self._attend)
        AttentionMaskInterface.register(self.NAME, sdpa_mask)
        language: Any = model.model.language_model
        language.config._attn_implementation = self.NAME
        self._targets: dict[str, torch.Tensor] = {}
        self._losses: dict[int, torch.Tensor] = {}
        self._hits: dict[int, torch.Tensor] = {}

    def expect(self, targets: dict[str, torch.Tensor]) -> None:
        """What the next forward pass should look at: `rows` and `positions` (N,), `subject` (N, T), `evidence` (N, ROWS, T)."""
        self._targets, self._losses, self._hits = targets, {}, {}

    def found(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Nats lost by looking elsewhere, and the share of attention on target, per layer."""
        names = {SUBJECT_LAYER: "subject_found", VALUE_LAYER: "evidence_found"}
        total = sum(self._losses.values(), torch.zeros(()))
        return total, {names[layer]: hit for layer, hit in self._hits.items()}

    def _attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **settings: Any
    ) -> Any:
        layer = getattr(module, "layer_idx", None)
        if self._targets and layer in (SUBJECT_LAYER, VALUE_LAYER):
            self._compare(layer, query, key)
        return sdpa_attention_forward(module, query, key, value, mask, **settings)

    def _compare(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
        """query and key (B, H, T, d): each half of the heads reads a row of patches."""
        rows, positions = self._targets["rows"], self._targets["positions"]
        heads = query.shape[1] // ROWS
        scores = torch.einsum("nhd,nhtd->nht", query[rows, :, positions], key[rows]) * query.shape[-1] ** -0.5
        later = torch.arange(key.shape[2]) > positions[:, None]
        share = scores.masked_fill(later[:, None], -torch.inf).log_softmax(-1)  # (N, H, T)
        if layer == SUBJECT_LAYER:
            target = self._targets["subject"][:, None].expand_as(share)
        else:
            target = self._targets["evidence"].repeat_interleave(heads, 1)
        asked = target.any(-1).all(-1)
        if asked.any():
            on_target = share.masked_fill(~target, -torch.inf)[asked].logsumexp(-1)  # (N', H)
            by_group = on_target.unflatten(1, (-1, heads)).logsumexp(-1) - math.log(heads)
            self._losses[layer] = -by_group.mean()
            self._hits[layer] = on_target.exp().mean().detach()


class Glance:
    """Attention of the vision tower's last block, from a printed value to what it belongs to and to the word before it."""

    NAME = "sdpa_glanced"

    def __init__(self, visual: Any) -> None:
        AttentionInterface.register(self.NAME, self._attend)
        visual.config._attn_implementation = self.NAME
        self._block = visual.blocks[-1].attn
        first = -(-visual.config.num_heads * 3 // 5)
        self._heads = (slice(0, first), slice(first, None))  # by link
        self.expect([])

    def expect(self, targets: list[torch.Tensor]) -> None:
        """What the next forward pass should look at: of each picture, in the order of its patches there, (links, P, P) booleans."""
        self._targets, self._picture = targets, 0
        self._lost: list[torch.Tensor] = []
        self._hits: list[torch.Tensor] = []

    def found(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats lost by looking elsewhere, and the share of attention on target, over all patches that should look."""
        if not self._lost:
            return torch.zeros(()), torch.tensor(torch.nan)
        return torch.cat(self._lost).mean(), torch.cat(self._hits).mean()

    def _attend(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> Any:
        if module is self._block and self._targets:
            self._compare(query[0], key[0])
        return sdpa_attention_forward(module, query, key, value, **settings)

    def _compare(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """query and key (H, P, d) of one picture."""
        for heads, target in zip(self._heads, self._targets[self._picture], strict=True):
            asked = target.any(1)
            if asked.any():
                scores = torch.einsum("hnd,hpd->hnp", query[heads, asked], key[heads]) * query.shape[-1] ** -0.5
                on_target = scores.log_softmax(-1).masked_fill(~target[asked], -torch.inf).logsumexp(-1)  # (H', N)
                self._lost.append(math.log(len(on_target)) - on_target.logsumexp(0))
                self._hits.append(on_target.detach().exp().mean(0))
        self._picture += 1
