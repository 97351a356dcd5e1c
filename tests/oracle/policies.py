"""Every eviction policy, and every ablation of VaSE, as selectors of the oracle.

A policy looks at the candidates in its own way, a `View`: which of them it protects, and by which
scores it keeps of the rest. It keeps the largest scores (`Ranking`) or draws in proportion to them
(`Drawing`). The sinks are protected by every policy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import normalize

from .selection import (
    Candidates,
    relative_margin,
    sampling_selector,
    select_greedy,
    selection_margins,
    split_protected,
)

View = Callable[[Candidates], Candidates]
"""Replaces `ranges` and `protected`, `scores`, or all of them."""


@dataclass(frozen=True)
class Ranking:
    """A selector: of what the view does not protect, the largest scores survive."""

    view: View

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        return select_greedy(self.view(candidates))

    def margins(self, candidates: Candidates) -> tuple[float, float]:
        """How clear the cuts are, see `selection_margins`. The view must not be a random one."""
        return selection_margins(self.view(candidates))


@dataclass(frozen=True)
class Drawing:
    """A selector: of what the view does not protect, draws in proportion to the scores."""

    view: View
    generator: torch.Generator | None = None

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        return sampling_selector(self.generator)(self.view(candidates))


@dataclass(frozen=True)
class Stratified:
    """A selector: what the view does not protect is cut by position into parts of equal size, which
    take turns to keep their largest score."""

    view: View
    strata: int

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        viewed = self.view(candidates)
        protected, _ = split_protected(viewed)
        kept = [token for part, count in self._parts(viewed) for token in part[:count]]
        return torch.cat([protected, torch.tensor(kept, dtype=protected.dtype)])

    def margins(self, candidates: Candidates) -> tuple[float, float]:
        """How clear the cuts are: see `selection_margins`, here of each part and, among the last
        ones that the parts keep, of those that only some of them may."""
        viewed = self.view(candidates)
        scores = viewed.scores
        parts = self._parts(viewed)
        rounds = max(count for _, count in parts)
        last = [part[rounds - 1] for part, _ in parts if len(part) >= rounds > 0]
        cuts = [(scores[part], count) for part, count in parts]
        cuts.append((scores[last], sum(count == rounds for _, count in parts)))
        clear = [relative_margin(values, count) for values, count in cuts]
        return selection_margins(viewed)[0], min(clear)

    def _parts(self, viewed: Candidates) -> list[tuple[list[int], int]]:
        """The tokens of each part, largest score first, and how many of them are kept."""
        _, rest = split_protected(viewed)
        by_position = sorted(rest.tolist(), key=lambda token: int(viewed.positions[token]))
        parts: list[list[int]] = [[] for _ in range(self.strata)]
        for place, token in enumerate(by_position):
            parts[place * self.strata // len(by_position)].append(token)
        for part in parts:
            part.sort(key=lambda token: -float(viewed.scores[token]))
        counts = [0] * self.strata
        for _ in range(viewed.keep - viewed.protected):
            fewest = min(c for c, part in zip(counts, parts, strict=True) if c < len(part))
            turn = [
                index
                for index, part in enumerate(parts)
                if counts[index] == fewest and len(part) > fewest
            ]
            best = max(turn, key=lambda index: float(viewed.scores[parts[index][fewest]]))
            counts[best] += 1
        return list(zip(parts, counts, strict=True))


# Which candidates are protected


def protect_sinks(candidates: Candidates) -> Candidates:
    """Nothing but the sinks: VaSE with `protect` or `magnitude` none, and all other policies."""
    ranges = _infinite_at_sinks(candidates, torch.zeros_like(candidates.scores))
    return replace(candidates, ranges=ranges, protected=int(ranges.isinf().sum()))


def protect_large(magnitude: str) -> View:
    """The P largest magnitudes of the values: VaSE with `protect` large."""

    def view(candidates: Candidates) -> Candidates:
        magnitudes = value_magnitudes(candidates.values, magnitude)
        return replace(candidates, ranges=_infinite_at_sinks(candidates, magnitudes))

    return view


def protect_at_random(generator: torch.Generator | None = None) -> View:
    """The sinks and P - sinks others, all equally likely: VaSE with `protect` random."""

    def view(candidates: Candidates) -> Candidates:
        lots = torch.rand(len(candidates.scores), dtype=torch.float64, generator=generator)
        return replace(candidates, ranges=_infinite_at_sinks(candidates, lots))

    return view


def value_magnitudes(values: torch.Tensor, magnitude: str) -> torch.Tensor:
    """How large each value vector is.

    range is max_d v[d] - min_d v[d], variance is sum_d (v[d] - mean)^2 / (D - 1), and l2 is
    sqrt(sum_d v[d]^2).

    Args:
        values: [n, D], float32.
        magnitude: One of these names.

    Returns:
        [n], float32.
    """
    if magnitude == "range":
        return values.amax(dim=-1) - values.amin(dim=-1)
    if magnitude == "variance":
        deviations = values - values.mean(dim=-1, keepdim=True)
        return deviations.square().sum(dim=-1) / (values.shape[-1] - 1)
    if magnitude == "l2":
        return values.square().sum(dim=-1).sqrt()
    raise ValueError(f"unknown magnitude {magnitude!r}")


def _infinite_at_sinks(candidates: Candidates, magnitudes: torch.Tensor) -> torch.Tensor:
    return magnitudes.masked_fill(candidates.positions < candidates.sinks, float("inf"))


# The policies


def vase_greedy(magnitude: str = "range") -> Ranking:
    """VaSE with `protect` large and `sampling` greedy."""
    return Ranking(protect_large(magnitude))


def evict_large(magnitude: str = "range") -> Ranking:
    """VaSE's ablation: the smallest magnitudes survive."""

    def view(candidates: Candidates) -> Candidates:
        scores = -value_magnitudes(candidates.values, magnitude)
        return replace(protect_sinks(candidates), scores=scores)

    return Ranking(view)


def snapkv() -> Ranking:
    """The largest attention."""
    return Ranking(protect_sinks)


def expected(value_norm: bool = True) -> Ranking:
    """The largest expected attention to queries like the window's, times the norm of the value.

    For q ~ N(m, S), E exp(q . k / sqrt(D)) = exp(m . k / sqrt(D) + k^T S k / (2 D)).
    """

    def view(candidates: Candidates) -> Candidates:
        keys, head_dim = candidates.keys.double(), candidates.keys.shape[-1]
        total = torch.zeros(len(keys), dtype=torch.float64)
        for queries in candidates.queries.double():
            mean = queries.mean(dim=0)
            covariance = (queries - mean).T @ (queries - mean) / len(queries)
            spread = torch.einsum("nd,de,ne->n", keys, covariance, keys)
            total += (keys @ mean / head_dim**0.5 + spread / (2 * head_dim)).softmax(dim=0)
        scores = (total / len(candidates.queries)).float()
        if value_norm:
            scores = scores * value_magnitudes(candidates.values, "l2")
        return replace(protect_sinks(candidates), scores=scores)

    return Ranking(view)


@dataclass(frozen=True)
class QueryMeans:
    """What the queries of one KV head are like before RoPE, which turns half to half.

    Attributes:
        mean: [G, D / 2], complex: the mean of the pairs of dimensions.
        mean_length: [G, D / 2], the mean length of the pairs.
        frequencies: [D / 2], in radians per token.
    """

    mean: torch.Tensor
    mean_length: torch.Tensor
    frequencies: torch.Tensor


def triattention(
    means: Callable[[Candidates], QueryMeans],
    longest_offset: int = 65536,
    aggregation: str = "max",
) -> Ranking:
    """The largest standardized preference of the mean queries to come.

    Keys are turned back by their positions. Margins are relative, but standardized scores are near
    0 or below it: moving all of them alike makes them at least 1.
    """

    def view(candidates: Candidates) -> Candidates:
        scores = triattention_scores(candidates, means(candidates), longest_offset)
        free = scores[:, candidates.positions >= candidates.sinks]
        deviation = (
            (free - free.mean(dim=-1, keepdim=True)).square().mean(dim=-1, keepdim=True).sqrt()
        )
        scores = (scores - free.mean(dim=-1, keepdim=True)) / deviation
        combined = scores.amax(dim=0) if aggregation == "max" else scores.mean(dim=0)
        return replace(protect_sinks(candidates), scores=combined - combined.min() + 1)

    return Ranking(view)


def triattention_scores(
    candidates: Candidates, means: QueryMeans, longest_offset: int
) -> torch.Tensor:
    """The trigonometric series over distances, and what the spread of the queries adds to it.

    mean over d of sum_f |E q_f| |k_f| cos(w_f (P + d - p) + arg(E q_f) - arg(k_f))
    + sum_f (E|q_f| - |E q_f|) |k_f|, with d = 1, 2, 4, ..., and k_f before its rotation.

    Returns:
        [G, n], float64.
    """
    half = candidates.keys.shape[-1] // 2
    first, second = candidates.keys[:, :half].double(), candidates.keys[:, half:].double()
    lengths = (first.square() + second.square()).sqrt()  # [n, D / 2]
    angles = torch.atan2(second, first) - candidates.positions[:, None] * means.frequencies
    offsets = []
    while 2 ** len(offsets) <= longest_offset:
        offsets.append(2 ** len(offsets))
    rows = []
    for mean, mean_length in zip(means.mean.to(torch.complex128), means.mean_length, strict=True):
        amplitudes = mean.abs() * lengths
        row = ((mean_length.double() - mean.abs()) * lengths).sum(dim=-1)
        for offset in offsets:
            distances = candidates.step + offset - candidates.positions
            phases = distances[:, None] * means.frequencies + mean.angle() - angles
            row = row + (amplitudes * phases.cos()).sum(dim=-1) / len(offsets)
        rows.append(row)
    return torch.stack(rows)


def distinct(ridge: float, remembers: bool = False) -> Ranking:
    """The P tokens that are the least like the window's, then the largest attention.

    Args:
        ridge: See `distinctness`.
        remembers: Whether the attention is the mean over all queries since a token came, of those
            that count, in the place of the window's.
    """

    def view(candidates: Candidates) -> Candidates:
        vectors = candidates.keys, candidates.window_keys
        units, window_units = (normalize(keys, dim=-1) for keys in vectors)
        similarity = (units @ window_units.T).mean(dim=-1)
        of_values = distinctness(candidates.values, candidates.window_values, ridge).sqrt()
        scores = (1 - similarity) * value_magnitudes(candidates.values, "range") * of_values
        if remembers:
            window = len(candidates.window_values)
            first_query = candidates.step - window * (candidates.eviction_index + 1)
            asked = candidates.step - candidates.positions.clamp_min(first_query)
            candidates = replace(candidates, scores=candidates.received / asked)
        return replace(candidates, ranges=_infinite_at_sinks(candidates, scores))

    return Ranking(view)


def distinctness(values: torch.Tensor, window_values: torch.Tensor, ridge: float) -> torch.Tensor:
    """Squared parts of each value along the principal axes of the window's, over their lengths.

    Args:
        values: [n, D], float32.
        window_values: [W, D], float32.
        ridge: Added to each axis's squared length, in multiples of their mean.

    Returns:
        [n], float32.
    """
    _, singular, axes = torch.linalg.svd(window_values.double(), full_matrices=True)
    squared = torch.zeros(values.shape[-1], dtype=torch.float64)
    squared[: len(singular)] = singular.square()
    parts = (values.double() @ axes.T).square()
    return (parts / (squared + ridge * squared.mean())).sum(dim=-1).float()


def h2o(recent: int) -> Ranking:
    """The newest tokens, then those that have received the most attention.

    Args:
        recent: Newest tokens, the window among them.
    """

    def view(candidates: Candidates) -> Candidates:
        is_recent = candidates.positions >= candidates.step - recent
        ranges = _infinite_at_sinks(candidates, torch.zeros_like(candidates.received))
        ranges = ranges.masked_fill(is_recent, float("inf"))
        protected = int(ranges.isinf().sum())
        return replace(candidates, ranges=ranges, protected=protected, scores=candidates.received)

    return Ranking(view)


def rkv(attention_weight: float = 0.5) -> Ranking:
    """The largest sum of attention and dissimilarity of the keys.

    Margins are relative, but a difference of two terms may be near 0 or below it. Moving all scores
    alike makes them at least 1 / n, which is the mean of both terms.
    """

    def view(candidates: Candidates) -> Candidates:
        scores = rkv_scores(candidates.scores, candidates.keys, attention_weight)
        scores = scores - scores.min() + 1 / len(scores)
        return replace(protect_sinks(candidates), scores=scores)

    return Ranking(view)


def rkv_scores(
    attention: torch.Tensor, keys: torch.Tensor, attention_weight: float
) -> torch.Tensor:
    """lambda * a[j] - (1 - lambda) * s[j], with s the softmax over the candidates of m.

    m[j] = (1 / n) * sum over i != j of cos(k[i], k[j]), with k / (|k| + 1e-8) as unit vectors.

    Args:
        attention: [n], float32.
        keys: [n, D], float32.
        attention_weight: lambda.

    Returns:
        [n], float32.
    """
    units = keys / (keys.square().sum(dim=-1, keepdim=True).sqrt() + 1e-8)
    cosines = (units @ units.T).fill_diagonal_(0)
    redundancy = (cosines.sum(dim=0) / len(keys)).softmax(dim=0)
    return attention_weight * attention - (1 - attention_weight) * redundancy


def cur(gaussian: Callable[[Candidates], torch.Tensor]) -> Ranking:
    """The largest leverage |k G|^2 * |v G|^2.

    Args:
        gaussian: The [D, columns] matrix G of an eviction. It tells `fixed` from `redrawn`.
    """

    def view(candidates: Candidates) -> Candidates:
        sketch = gaussian(candidates)
        key_leverage, value_leverage = (
            (rows @ sketch).square().sum(dim=-1) for rows in (candidates.keys, candidates.values)
        )
        return replace(protect_sinks(candidates), scores=key_leverage * value_leverage)

    return Ranking(view)


def streaming() -> Ranking:
    """The newest positions."""

    def view(candidates: Candidates) -> Candidates:
        return replace(protect_sinks(candidates), scores=candidates.positions.double())

    return Ranking(view)


def uniform(generator: torch.Generator | None = None) -> Drawing:
    """All equally likely: the policy `random`."""

    def view(candidates: Candidates) -> Candidates:
        return replace(protect_sinks(candidates), scores=torch.ones_like(candidates.scores))

    return Drawing(view, generator)
