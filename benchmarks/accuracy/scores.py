"""What candidates may be ranked by: scores, of which the largest are kept."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from benchmarks.accuracy.teacher_forcing import TextCandidates
from vase_vllm.kernels.torch_distinctness import (
    similarity_to,
    value_distinctness,
    whitened_length,
)
from vase_vllm.kernels.torch_eviction import value_range
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.rkv import mean_similarity

Score = Callable[[TextCandidates], Tensor]
"""[H, n]."""
Vectors = Callable[[Candidates], Tensor]
"""[H, D, n]."""


# What tokens are compared by


def keys(c: Candidates) -> Tensor:
    return c.keys


def values(c: Candidates) -> Tensor:
    return c.values.transpose(-1, -2)


def centred(of: Vectors) -> Vectors:
    """Less their mean over the candidates."""
    return lambda c: of(c) - of(c).mean(dim=-1, keepdim=True)


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-8)


def unit_of(of: Vectors) -> Vectors:
    return lambda c: unit(of(c))


def joint(c: Candidates) -> Tensor:
    """Key and value, each centred and of norm 1, one after the other."""
    return torch.cat([unit(centred(keys)(c)), unit(centred(values)(c))], dim=1)


def pair_norms_and_values(c: Candidates) -> Tensor:
    """As :func:`joint`, of the norms of the pairs that RoPE rotates, the same at every position."""
    norms = centred(lambda c: torch.hypot(*c.keys.chunk(2, dim=1)))
    return torch.cat([unit(norms(c)), unit(centred(values)(c))], dim=1)


# Scores


def whitening(sample: Tensor, ridge: float) -> Tensor:
    """[H, D, D], after which vectors have the policy ``distinct``'s ``whitened_length``.

    It is computed from the D directions in the place of the rows of the sample, which may be many.

    Args:
        sample: [H, m, D] fp32, finite.
    """
    gram = sample.transpose(-1, -2) @ sample
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += (ridge * diagonal.mean(dim=-1, keepdim=True)).clamp_min(1e-8)
    lower = torch.linalg.cholesky(gram)
    identity = torch.eye(gram.shape[-1])
    return torch.linalg.solve_triangular(lower, identity, upper=False).transpose(-1, -2)


def rare(of: Vectors, neighbours: int) -> Score:
    """Minus the mean of the largest cosine similarities to others: n^2 D operations."""

    def score(c: Candidates) -> Tensor:
        x = unit(of(c))
        similarity = x.transpose(-1, -2) @ x
        similarity.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
        return -similarity.topk(neighbours, dim=-1).values.mean(dim=-1)

    return score


def leverage_of(of: Vectors, ridge: float = 0.1) -> Score:
    """Ridge leverage scores among the candidates."""

    def score(c: Candidates) -> Tensor:
        rows = of(c).transpose(-1, -2)
        return (rows @ whitening(rows, ridge)).square().sum(dim=-1)

    return score


def unlike_the_mean(c: Candidates) -> Tensor:
    """1 less the mean cosine similarity of the key to the others."""
    return 1 - mean_similarity(c.keys)


def novelty_with(ridge: float) -> Score:
    """Squared length of the value after the whitening of the window's values."""
    return lambda c: whitened_length(c.window_values, ridge)(c.values).square()


def square_root(score: Score) -> Score:
    return lambda c: score(c).sqrt()


def product(*scores: Score) -> Score:
    return lambda c: torch.stack([score(c) for score in scores]).prod(dim=0)


def attention(c: Candidates) -> Tensor:
    return c.attention()


def attention_less_redundancy(c: Candidates) -> Tensor:
    """R-KV's, without smoothing."""
    return attention(c) - torch.softmax(mean_similarity(c.keys), dim=-1)


def range_of_value(c: Candidates) -> Tensor:
    return c.of_values(value_range)


def norm_of_value(c: Candidates) -> Tensor:
    return c.of_values(lambda part: part.float().norm(dim=-1))


def distinctness(c: Candidates) -> Tensor:
    """What the policy ``distinct`` protects by."""
    of_values = c.of_values(value_distinctness(c.window_values, 0.1))
    return (1 - similarity_to(c.window_keys, c.keys)) * of_values


def surprise_of(tokens: int) -> Score:
    """The mean NLL of the token and its neighbours in the text, an odd number of them, in nats."""

    def score(c: TextCandidates) -> Tensor:
        pooled = avg_pool1d(
            c.surprise[None], tokens, stride=1, padding=tokens // 2, count_include_pad=False
        )
        return pooled[0, c.positions]

    return score


def attention_of(queries: int) -> Score:
    """Mean attention of the newest queries, of those that came after the token.

    The window's queries are among the newest ``queries``, or only the newest of them.
    """

    def score(c: TextCandidates) -> Tensor:
        asking = c.queries_of_text[:, -queries:]
        positions = torch.arange(c.position - asking.shape[1], c.position)
        logits = (asking.flatten(1, 2) @ c.keys).unflatten(1, asking.shape[1:3]) * c.scale
        sees = c.positions[:, None] < positions[:, None]
        logits.masked_fill_(~sees[:, :, None], -torch.inf)
        return logits.softmax(dim=-1).sum(dim=(1, 2)) / sees.sum(dim=1)

    return score


def newest(c: TextCandidates) -> Tensor:
    return c.positions.float()


def by_strata(score: Score, strata: int) -> Score:
    """Ranks within strata of equal size by position, so that each keeps as many as the others."""

    def ranks(c: TextCandidates) -> Tensor:
        stratum = c.positions.argsort(dim=-1).argsort(dim=-1) * strata // c.num
        by_score = score(c).argsort(dim=-1, descending=True)
        in_stratum = stratum.gather(-1, by_score)
        # Of each token in the order of the score, how many of its stratum came before it.
        rank = torch.zeros_like(by_score, dtype=torch.float32)
        for number in range(strata):
            of_these = in_stratum == number
            rank += of_these * of_these.cumsum(dim=-1)
        return -torch.empty_like(rank).scatter_(-1, by_score, rank)

    return ranks
