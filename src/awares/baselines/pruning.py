"""Which visual tokens the training-free systems keep: pure functions on tensors (PAPER §6).

The N visual tokens of an image are in raster order, one per 2x2 merge group; r is the share that is kept. Every choice
is deterministic, and equal scores go to the lowest index. `pruned_decode` shortens the sequences.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from awares.errors import AwaresValueError

DEPTH = 28  # decoder layers of Qwen2.5-VL-7B, to which the layers of FastV and SparseVLM refer
CONTEXTUAL = 0.05  # VisionZip: share of N for merged tokens
CHUNKS = 8  # HoloV: P (assumed)
DIVERSITY = 0.09  # HoloV: weight of a chunk's diversity next to its attention, as in the released code
RECYCLED = 0.3  # SparseVLM: share of the pruned tokens that is clustered
CLUSTER = 10  # SparseVLM: recycled tokens a cluster
QUERIES = 512  # queries a block in `received`: bounds the memory for attention maps


class Selection(NamedTuple):
    """``kept``: ascending indices (K,); ``vectors``: their features from now on, (K, width)."""

    kept: Tensor
    vectors: Tensor


def budget(count: int, ratio: float) -> int:
    """Tokens kept of ``count``: round(r N), halves up, at least one. AwaresValueError unless 0 < r <= 1."""
    if not 0 < ratio <= 1:
        raise AwaresValueError(f"retained ratio {ratio}: give a number above 0 and at most 1")
    return max(1, int(ratio * count + 0.5))


def top(scores: Tensor, count: int) -> Tensor:
    """The ``count`` highest of ``scores`` (N,): their indices, ascending; ties go to the lowest index."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def pack_left(keep: Tensor) -> tuple[Tensor, Tensor]:
    """bool (B, T) -> where to gather each row's kept tokens from, padded left again, and their mask: (B, longest)."""
    longest = int(keep.sum(dim=1).max())
    index = keep.int().sort(dim=1, stable=True).indices[:, keep.shape[1] - longest :]
    return index, keep.gather(1, index).long()


def received(query: Tensor, key: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Attention that each patch receives: s_j = sum_i mean_h softmax_j(q_hi k_hj scale), i, j within one segment.

    ``query``, ``key``: (S, heads, head_dim) after rotary embedding; ``lengths`` of the segments. Returns (S,), float32.
    """
    scores = []
    for q, k in zip(query.split(list(lengths)), key.split(list(lengths)), strict=True):
        keys = k.permute(1, 2, 0).float()  # (heads, head_dim, n)
        blocks = [(rows.transpose(0, 1).float() * scale @ keys).softmax(-1).sum(1).mean(0) for rows in q.split(QUERIES)]
        scores.append(torch.stack(blocks).sum(0))
    return torch.cat(scores)


def visionzip_tokens(scores: Tensor, keys: Tensor, features: Tensor, ratio: float) -> Selection:
    """VisionZip: (r - 0.05) N dominant tokens by ``scores`` (N,), 0.05 N contextual ones that merge the others.

    Contextual targets are at even stride in the rest; each other token joins the target of the largest cosine between
    ``keys`` (N, head_dim), and a target becomes the mean of the ``features`` (N, width) of its group.
    """
    count, total = len(scores), budget(len(scores), ratio)
    contextual = min(max(1, budget(count, CONTEXTUAL)), total - 1)
    dominant = top(scores, total - contextual)
    rest = _others(count, dominant)
    merged = features.clone()
    targets = rest[torch.arange(contextual, device=rest.device) * len(rest) // max(contextual, 1)]
    if contextual:
        directions = normalize(keys.float(), dim=-1)
        nearest = (directions[rest] @ directions[targets].T).argmax(dim=1)
        nearest[torch.isin(rest, targets)] = torch.arange(contextual, device=rest.device)
        merged[targets] = _means(features[rest], nearest, contextual)
    kept = torch.cat([dominant, targets]).sort().values
    return Selection(kept, merged[kept])


def holov_tokens(
    scores: Tensor, features: Tensor, ratio: float, chunks: int = CHUNKS, diversity: float = DIVERSITY
) -> Selection:
    """HoloV: a quota of r N for each of P contiguous chunks, inside a chunk the top by ``scores`` (N,).

    The weight of chunk c is a_c / mean(a) + ``diversity`` * v_c / mean(v): its mean attention, and the mean over its
    tokens of the variance of their cosine similarities to the chunk's other tokens. Both are scaled over the whole
    image (src/awares/README.md, departure 7).
    """
    count = len(scores)
    parts = torch.arange(count, device=scores.device).tensor_split(min(chunks, count))
    attention = torch.stack([scores[part].float().mean() for part in parts])
    spread = torch.stack([_similarity_variance(features[part]) for part in parts])
    weights = _to_unit_mean(attention) + diversity * _to_unit_mean(spread)
    shares = quotas(weights.tolist(), [len(part) for part in parts], budget(count, ratio))
    kept = torch.cat([part[top(scores[part], share)] for part, share in zip(parts, shares, strict=True)])
    return Selection(kept, features[kept])


def quotas(weights: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """``total`` (<= sum of ``sizes``) by ``weights``, none above its size; largest remainders, first chunk at ties."""
    real = [0.0] * len(sizes)
    while total - sum(real) > 1e-6:
        room = [size - share > 1e-9 for size, share in zip(sizes, real, strict=True)]
        active = [weight if free else 0.0 for weight, free in zip(weights, room, strict=True)]
        if not sum(active):  # only chunks of weight zero have room left
            active = [float(free) for free in room]
        step = (total - sum(real)) / sum(active)
        real = [min(size, share + step * weight) for size, share, weight in zip(sizes, real, active, strict=True)]
    whole = [int(share + 1e-6) for share in real]
    by_remainder = sorted(range(len(sizes)), key=lambda n: (-round(real[n] - whole[n], 6), n))
    for n in [n for n in by_remainder if whole[n] < sizes[n]][: total - sum(whole)]:
        whole[n] += 1
    return whole


def random_tokens(features: Tensor, ratio: float, name: str, seed: int = 0) -> Selection:
    """The control: r N tokens drawn without replacement; ``name`` (the row's id) and ``seed`` alone determine them."""
    count, digest = len(features), hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    kept = torch.randperm(count, generator=generator)[: budget(count, ratio)].sort().values.to(features.device)
    return Selection(kept, features[kept])


def attention_of(query: Tensor, key: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """mean_h softmax(q_h K_h^T scale) of some tokens over a row's T positions: (Q, T), float32.

    ``query`` (heads, Q, head_dim) and ``key`` (key heads, T, head_dim) after rotary embedding; ``allowed`` (Q, T).
    """
    keys = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0).float()
    logits = query.float() @ keys.transpose(1, 2) * scale
    return logits.masked_fill(~allowed, float("-inf")).softmax(dim=-1).mean(dim=0)


def fastv_tokens(attention: Tensor, hidden: Tensor, count: int) -> Selection:
    """FastV: the ``count`` tokens of ``hidden`` (N, width) with most ``attention`` (Q, N) of the last text token."""
    kept = top(attention[-1], count)
    return Selection(kept, hidden[kept])


def sparsevlm_tokens(attention: Tensor, hidden: Tensor, count: int) -> Selection:
    """SparseVLM: keep the best of N visual tokens by the raters' mean attention, and recycle some of the others.

    Raters are the text tokens t with R_t >= mean(R), where R_t = sum_j A_tj, A = ``attention`` (Q, N). The best 30 % of
    the other visual tokens are clustered, one cluster per ten tokens plus one, and each cluster's mean replaces its
    centre. ``count`` includes these. ``hidden`` (N, width).
    """
    mass = attention.sum(dim=1)
    raters = mass >= min(mass.mean(), mass.max())  # the rounded mean of equal values may lie above them
    scores = attention[raters].mean(dim=0)
    lost = len(scores) - count
    clusters = min(int(RECYCLED * lost) // CLUSTER + 1, count - 1) if lost else 0
    best = top(scores, count - clusters)
    vectors = hidden.clone()
    rest = _others(len(scores), best)
    recycled = rest[top(scores[rest], -int(-RECYCLED * len(rest) // 1))]
    if clusters:
        centres, labels = cluster(hidden[recycled], clusters)
        vectors[recycled[centres]] = _means(hidden[recycled], labels, clusters)
        best = torch.cat([best, recycled[centres]]).sort().values
    return Selection(best, vectors[best])


def cluster(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Density peaks: centres (count,), ascending, and each point's cluster (R,), for ``points`` (R, width).

    rho_i = exp(-mean of d_ij^2 over the ``count`` nearest, itself among them), delta_i = the distance to the nearest
    denser point (the densest: the largest distance); centres have the largest rho delta, and a point joins the nearest
    centre. d is over sqrt(width).
    """
    distance = torch.cdist(points.float(), points.float()) / points.shape[1] ** 0.5
    nearest = distance.topk(min(count, len(points)), largest=False).values
    density = (-nearest.square().mean(dim=1)).exp()
    rank = density.sort(descending=True, stable=True).indices.argsort()  # equal densities: the lower index is denser
    denser = rank[None, :] < rank[:, None]
    delta = distance.masked_fill(~denser, float("inf")).amin(dim=1)
    centres = top(density * delta.clamp(max=distance.max()), count)
    labels = distance[:, centres].argmin(dim=1)
    labels[centres] = torch.arange(count, device=points.device)
    return centres, labels


def scaled_layers(layers: Sequence[int], depth: int) -> list[int]:
    """Layers of a model of 28 scaled to ``depth``, at least 1, all different; AwaresValueError if none is left."""
    scaled: list[int] = []
    for layer in layers:
        scaled.append(max(int(layer * depth / DEPTH + 0.5), (scaled[-1] if scaled else 0) + 1))
    if scaled[0] >= depth:
        raise AwaresValueError(f"pruning inside a language model of {depth} layer(s): it needs two or more")
    return [layer for layer in scaled if layer < depth]


def geometric_schedule(ratio: float, layers: Sequence[int], depth: int) -> dict[int, float]:
    """Shares kept from each of ``layers`` on, q, q^2, ..., so that the mean over all ``depth`` layers is ``ratio``.

    With n_j layers between the j-th and the next pruning: sum_j n_j q^j = r depth, solved by bisection.
    AwaresValueError unless r exceeds the share of the layers before the first one, which keep all tokens.
    """
    spans = [end - begin for begin, end in zip([0, *layers], [*layers, depth], strict=True)]
    least = spans[0] / depth
    if not least < ratio <= 1:
        raise AwaresValueError(f"retained ratio {ratio}: {depth} layers need one above {least:.3f} and at most 1")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        mean = sum(span * middle**stage for stage, span in enumerate(spans)) / depth
        low, high = (middle, high) if mean < ratio else (low, middle)
    return {layer: high**stage for stage, layer in enumerate(layers, start=1)}


def _others(count: int, chosen: Tensor) -> Tensor:
    free = torch.ones(count, dtype=torch.bool, device=chosen.device)
    free[chosen] = False
    return free.nonzero().flatten()


def _means(vectors: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mean of the ``vectors`` (R, width) of each of ``count`` groups."""
    sums = vectors.new_zeros(count, vectors.shape[1], dtype=torch.float32).index_add_(0, labels, vectors.float())
    return (sums / labels.bincount(minlength=count)[:, None]).to(vectors.dtype)


def _similarity_variance(features: Tensor) -> Tensor:
    """Mean over tokens of the variance of a token's cosine similarities to the others; 0 for fewer than three."""
    count, directions = len(features), normalize(features.float(), dim=-1)
    if count < 3:
        return torch.zeros((), device=features.device)
    own = torch.eye(count, dtype=torch.bool, device=features.device)
    return (directions @ directions.T)[~own].view(count, count - 1).var(dim=1, unbiased=False).mean()


def _to_unit_mean(values: Tensor) -> Tensor:
    mean = values.mean()
    return values / mean if mean > 0 else values
