"""Look-up: the code of a visual token, two language layers that begin as a look-up, and losses on attention.

A question takes three steps: find its subject, find the visual token with the value, read the value. No step pays
without the others, so a small model that is trained on answers alone learns the usual answers. Hence a `Code` that the
vision tower learns to write and that symbolic pages are made of, two initialised layers, and losses on attention.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from targets import ROWS, SUBJECTS, TRAITS, WORDS, Tensors

SUBJECT_LAYER, VALUE_LAYER = 1, 3  # of the language tower
SHARPNESS = 24.0  # of `Code.misread`: mean logit of the right word, where an average other word gets 0
SPREAD = 2.0  # standard deviation of an embedding's entries; large, so that early layers do not drown the code


class Code:
    """What a visual token should hold: for either row of its patches, the words there and their subjects.

    The token has four rooms of D / 4 dimensions. A room is a random projection of an embedding; it is narrow, because a
    patch of the vision tower must hold two rooms and its own features.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, width: int, seed: int) -> None:
        draw = Generator().manual_seed(seed)
        self.embedding = SPREAD * torch.randn(len(tokenizer), width, generator=draw)  # (V, D)
        # a number is the sum of its tens and its units: a merger cannot form a hundred arbitrary vectors
        tens, units = SPREAD * torch.randn(2, 10, width, generator=Generator().manual_seed(seed + 1)) / math.sqrt(2)
        for number in range(100):
            ids = tokenizer(str(number), add_special_tokens=False)["input_ids"]
            if len(ids) == 1:
                self.embedding[ids[0]] = tens[number // 10] + units[number % 10]
        self.basis = _rotation(width, width, draw)  # (heads · d, D): the directions of each head
        self.answer_turn = _rotation(width, width, draw)
        rank = width // (2 * ROWS)
        rooms = _rotation(width, width, draw).split(rank)  # (D / 4, D) each
        turns = [
            math.sqrt(width / rank) * part.T @ _rotation(len(part), rank, draw) @ room
            for part, room in zip(2 * self.basis.chunk(ROWS), rooms, strict=True)
        ]
        self.subject_turns, self.own_turns = turns[:ROWS], turns[ROWS:]  # (D, D) of rank D / 4, one a row
        self.words, self.traits, self.subjects = (self._table(tokenizer, names) for names in (WORDS, TRAITS, SUBJECTS))

    def _table(self, tokenizer: PreTrainedTokenizerFast, words: list[str]) -> Tensor:
        """(1 + words, D): zeros for nothing, then each word as the mean of its tokens with and without a space."""
        rows = [torch.zeros(self.embedding.shape[1])]
        for word in words:
            forms = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in (word, f" {word}")]
            rows.append(self.embedding[[ids[0] for ids in forms if len(ids) == 1]].mean(0))
        return torch.stack(rows)

    def __call__(self, words: Tensor, traits: Tensor, links: Tensor) -> Tensor:
        """The code (N, D) of words (N, 4), traits (N, 4) and links (N, 4, LINKS); the unknown counts as nothing."""
        code = torch.zeros(len(words), self.embedding.shape[1])
        rows = zip(*(ids.clamp(min=0).chunk(ROWS, 1) for ids in (words, traits, links)), strict=True)
        for row, (word, trait, link) in enumerate(rows):
            own = self.words[word].sum(1) + self.traits[trait].sum(1)
            code = code + self.subjects[link].sum((1, 2)) @ self.subject_turns[row] + own @ self.own_turns[row]
        return code / ROWS

    def misread(self, found: Tensor, words: Tensor, traits: Tensor, links: Tensor) -> Tensor:
        """Cross-entropy of the words in each room of tokens ``found`` (N, D), named by the nearest of its table.

        It complements `distance`: a token near its code may be nearer to another. Empty and unknown rooms do not count.
        """
        losses = []
        things = torch.cat([self.words, self.traits[1:]])
        traits = torch.where(traits > 0, traits + len(self.words) - 1, traits)
        own = [torch.cat(ids, 1) for ids in zip(words.chunk(ROWS, 1), traits.chunk(ROWS, 1), strict=True)]
        for row, subjects in enumerate(links.chunk(ROWS, 1)):
            for ids, table, turn in (
                (subjects.flatten(1), self.subjects, self.subject_turns[row]),
                (own[row], things, self.own_turns[row]),
            ):
                known = (ids >= 0).all(1) & (ids > 0).any(1)
                if known.any():
                    codes = table[1:] @ turn
                    logits = SHARPNESS * found[known] @ codes.T / codes.square().sum(-1).mean()
                    each = logits.log_softmax(-1).gather(1, (ids[known] - 1).clamp(min=0))
                    filled = ids[known] > 0
                    losses.append(-(each * filled).sum(1) / filled.sum(1))
        return torch.cat(losses).mean() if losses else found.sum() * 0

    def distance(self, found: Tensor, code: Tensor) -> Tensor:
        """Squared distance (N,) of tokens (N, D) from their code, in units of half an embedding."""
        return 2 * (found - code).square().sum(-1) / (self.embedding.shape[1] * SPREAD**2)


def _rotation(rows: int, columns: int, draw: Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=draw))[0]


def prepare(model: Any, code: Code) -> None:
    """Set embeddings, output head and the two look-up layers; each half of the heads reads one row of patches.

    One layer copies the subject of the question to where the answer starts. The other matches it with the subject in
    the code and copies the value. Every head uses its own random directions.
    """
    layers, basis = model.model.language_model.layers, code.basis
    copy, look = layers[SUBJECT_LAYER].self_attn, layers[VALUE_LAYER].self_attn
    draw = Generator().manual_seed(1)

    def turned(turns: list[Tensor]) -> Tensor:
        parts = zip(basis.chunk(ROWS), turns, strict=True)
        return torch.cat([part @ turn / math.sqrt(2 * ROWS) for part, turn in parts])

    def noise(weight: Tensor) -> Tensor:
        return 0.01 * torch.randn(weight.shape, generator=draw)

    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.copy_(code.embedding)
        model.lm_head.weight.copy_(0.075 / SPREAD * code.embedding @ code.answer_turn)
        copy.v_proj.weight.copy_(basis)
        copy.o_proj.weight.copy_(2 * basis.T + noise(copy.o_proj.weight))
        look.q_proj.weight.copy_(2.5 * basis + noise(look.q_proj.weight))
        look.k_proj.weight.copy_(2.5 * turned(code.subject_turns))
        look.v_proj.weight.copy_(turned(code.own_turns))
        look.o_proj.weight.copy_(5 * (basis @ code.answer_turn).T + noise(look.o_proj.weight))


class Watch:
    """The attention of chosen positions in the two look-up layers, compared with where it should be."""

    LAYERS = {SUBJECT_LAYER: "subject", VALUE_LAYER: "evidence"}

    def __init__(self, language: Any) -> None:
        AttentionInterface.register("sdpa_watched", self._attend)
        AttentionMaskInterface.register("sdpa_watched", sdpa_mask)
        language.config._attn_implementation = "sdpa_watched"
        self.expect({})

    def expect(self, targets: Tensors) -> None:
        """Targets of the next forward pass: rows and positions (N,), subject (N, T), evidence (N, ROWS, T)."""
        self._targets = targets
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def found(self) -> tuple[Tensor, Tensors]:
        """The loss (nats), and the share of each layer's attention that is on target."""
        loss = sum((loss for loss, _ in self._found.values()), torch.zeros(()))
        return loss, {f"{name}_found": share for name, (_, share) in self._found.items()}

    def _attend(self, module: Any, query: Tensor, key: Tensor, *inputs: Any, **settings: Any) -> Any:
        name = self.LAYERS.get(module.layer_idx)
        if self._targets and name:
            self._compare(name, query, key)
        return sdpa_attention_forward(module, query, key, *inputs, **settings)

    def _compare(self, name: str, query: Tensor, key: Tensor) -> None:
        """query and key (B, H, T, d); each half of the heads reads a row of patches."""
        rows, positions = self._targets["rows"], self._targets["positions"]
        heads = query.shape[1] // ROWS
        scores = torch.einsum("nhd,nhtd->nht", query[rows, :, positions], key[rows]) * query.shape[-1] ** -0.5
        later = torch.arange(key.shape[2]) > positions[:, None]
        share = scores.masked_fill(later[:, None], -torch.inf).log_softmax(-1)  # (N, H, T)
        target = self._targets[name]
        target = target[:, None].expand_as(share) if name == "subject" else target.repeat_interleave(heads, 1)
        shown = target.any(-1).all(-1)
        if shown.any():
            on_target = share.masked_fill(~target, -torch.inf)[shown].logsumexp(-1)  # (N', H)
            by_row = on_target.unflatten(1, (-1, heads)).logsumexp(-1) - math.log(heads)
            self._found[name] = -by_row.mean(), on_target.exp().mean().detach()


class Glance:
    """The attention of the vision tower's last block from a printed value to its subject and to the word before it."""

    def __init__(self, visual: Any) -> None:
        AttentionInterface.register("sdpa_glanced", self._attend)
        visual.config._attn_implementation = "sdpa_glanced"
        self._block = visual.blocks[-1].attn
        first = -(-visual.config.num_heads * 3 // 5)
        self._heads = (slice(0, first), slice(first, None))  # of each link
        self.expect([])

    def expect(self, targets: list[Tensor]) -> None:
        """Targets of the next forward pass: for each picture (LINKS, P, P) booleans, patches in window order."""
        self._targets: Iterator[Any] = iter(targets)
        self._found: list[tuple[Tensor, Tensor]] = []

    def found(self) -> tuple[Tensor, Tensor]:
        """The loss (nats) and the share of attention on target, over all patches that have one."""
        if not self._found:
            return torch.zeros(()), torch.tensor(torch.nan)
        losses, shares = zip(*self._found, strict=True)
        return torch.cat(losses).mean(), torch.cat(shares).mean()

    def _attend(self, module: Any, query: Tensor, key: Tensor, *inputs: Any, **settings: Any) -> Any:
        targets = next(self._targets, ()) if module is self._block else ()
        for heads, target in zip(self._heads, targets, strict=False):
            shown = target.any(1)
            if shown.any():
                values, sources = query[0, heads, shown], key[0, heads]  # (H', N, d), (H', P, d)
                scores = torch.einsum("hnd,hpd->hnp", values, sources) * query.shape[-1] ** -0.5
                on_target = scores.log_softmax(-1).masked_fill(~target[shown], -torch.inf).logsumexp(-1)  # (H', N)
                loss = math.log(len(on_target)) - on_target.logsumexp(0)
                self._found.append((loss, on_target.detach().exp().mean(0)))
        return sdpa_attention_forward(module, query, key, *inputs, **settings)
