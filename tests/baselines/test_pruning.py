"""Token selection on hand-made attention maps, features and quotas."""

import numpy as np
import pytest
import torch
from torch import Tensor

from awares.baselines import pruning
from awares.baselines.pruning import Selection
from awares.errors import AwaresError


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_quotas_are_proportional_and_overflow_goes_to_the_others() -> None:
    assert pruning.quotas([1, 1, 2], [10, 10, 10], 12) == [3, 3, 6]
    assert pruning.quotas([1, 2, 8], [10, 3, 4], 12) == [5, 3, 4]  # the overflow overflows again
    assert pruning.quotas([0, 0, 1], [4, 4, 4], 6) == [1, 1, 4]
    assert pruning.quotas([1, 1, 1], [4, 4, 4], 7) == [3, 2, 2]  # ties to the first
    rng = np.random.default_rng(0)
    for _ in range(500):
        sizes = rng.integers(1, 30, rng.integers(1, 9)).tolist()
        weights = (rng.random(len(sizes)) ** 4 * rng.integers(0, 2, len(sizes))).tolist()
        total = int(rng.integers(1, sum(sizes) + 1))
        found = pruning.quotas(weights, sizes, total)
        assert sum(found) == total and all(0 <= share <= size for share, size in zip(found, sizes, strict=True))


def test_holov_follows_attention_and_gives_a_diverse_chunk_more_than_a_flat_one() -> None:
    """Two chunks of 8 with three quarters of the attention in the second: 2 and 6 of 8, the best of each."""
    scores = torch.tensor([1, 1, 1, 1, 2, 2, 0, 0, 3, 3, 3, 3, 3, 6, 3, 0.0])
    features = rand(8, 5).repeat(2, 1)
    found = pruning.holov_tokens(scores, features, 0.5, chunks=2, diversity=0.0)
    assert found.kept.tolist() == [4, 5, 8, 9, 10, 11, 12, 13]
    scores = torch.ones(40)
    features = torch.cat([torch.ones(20, 6) + 1e-3 * rand(20, 6), rand(20, 6, seed=1)])
    even = pruning.holov_tokens(scores, features, 0.5, chunks=2, diversity=0.0)
    diverse = pruning.holov_tokens(scores, features, 0.5, chunks=2, diversity=1.0)
    assert [(one.kept < 20).sum().item() for one in (even, diverse)] == [10, 5]
    assert len(diverse.kept) == 20


def test_random_tokens_depend_on_name_and_seed_alone() -> None:
    def drawn(*name: str | int, count: int = 100) -> Tensor:
        return pruning.random_tokens(torch.zeros(count, 1), 0.5, *name).kept  # type: ignore[arg-type]

    first = drawn("row-1")
    assert torch.equal(first, drawn("row-1")) and len(first) == 50
    assert not torch.equal(first, drawn("row-2")) and not torch.equal(first, drawn("row-1", 1))
    counts = torch.cat([drawn(str(n), count=10) for n in range(2000)]).bincount()
    assert (counts / 2000 - 0.5).abs().max() < 0.05  # every place alike


def test_sparsevlm_listens_to_the_raters_alone_and_recycles_the_best_of_the_pruned() -> None:
    """20 tokens to 12: one cluster of the best three of the nine that are pruned (30 %, rounded up)."""
    attention = torch.zeros(3, 20)
    attention[0] = torch.arange(20.0) / 100  # the only rater; the others love the low tokens, but hardly look
    attention[1:, 0] = 0.01
    hidden = rand(20, 4)
    found = pruning.sparsevlm_tokens(attention, hidden, 12)
    (centre,) = set(found.kept.tolist()) - set(range(9, 20))
    assert len(found.kept) == 12 and centre in (6, 7, 8)
    assert torch.allclose(found.vectors[0], hidden[6:9].mean(dim=0), atol=1e-6)
    assert torch.equal(found.vectors[1:], hidden[9:20])


@pytest.mark.parametrize("depth, layers", [(28, (2, 6, 15)), (36, (3, 8, 19)), (6, (1, 2, 3)), (7, (1, 2, 4))])
@pytest.mark.parametrize("ratio", [0.36, 0.5, 1.0])
def test_the_schedule_meets_the_ratio_in_the_mean_over_layers(depth: int, layers: tuple[int, ...], ratio: float):
    shares = pruning.geometric_schedule(ratio, layers, depth)
    held = [1.0 if layer < layers[0] else shares[max(s for s in layers if s <= layer)] for layer in range(depth)]
    assert np.mean(held) == pytest.approx(ratio, abs=1e-9)
    assert list(shares) == list(layers) and held == sorted(held, reverse=True)
    assert pruning.scaled_layers((2, 6, 15), depth) == list(layers)
    with pytest.raises(AwaresError, match="above"):  # less than the share of the full layers
        pruning.geometric_schedule(0.9 * layers[0] / depth, layers, depth)


def choices(count: int, ratio: float) -> dict[str, Selection]:
    scores, keys, features, attention = rand(count).abs(), rand(count, 4), rand(count, 6), rand(5, count).abs()
    return {
        "holov": pruning.holov_tokens(scores, features, ratio),
        "random": pruning.random_tokens(features, ratio, "a"),
        "visionzip": pruning.visionzip_tokens(scores, keys, features, ratio),
        "fastv": pruning.fastv_tokens(attention, features, pruning.budget(count, ratio)),
        "sparsevlm": pruning.sparsevlm_tokens(attention, features, pruning.budget(count, ratio)),
    }


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.364, 0.5, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 9, 25, 144, 601])
def test_every_choice_meets_its_budget_with_ascending_indices(count: int, ratio: float) -> None:
    for name, found in choices(count, ratio).items():
        kept = found.kept.tolist()
        assert len(kept) == max(1, int(count * ratio + 0.5)) == len(found.vectors), name
        assert kept == sorted(set(kept)) and 0 <= kept[0] and kept[-1] < count, name
        assert not found.vectors.isnan().any(), name
        assert ratio < 1 or torch.equal(found.vectors, rand(count, 6)), name
