"""Which tokens one eviction of one KV head keeps, in plain torch and in order of position.

G query heads share the KV head, D is the head dimension, W the window, n the number of candidates.
Ties, in the value range and in the score alike, are broken in favour of the lowest position.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Settings:
    """What an eviction is told. Lengths are in tokens.

    Attributes:
        budget: T, tokens held right after an eviction, the window included.
        window: W, newest tokens that always stay and whose queries score the rest; also the period.
        protected: P, candidates kept for their value range, the sinks included.
        sinks: The first positions of the sequence, always protected.
        smoothing: Width of the average pooling of the scores over positions; odd, 1 is off.
        temperature: Divides the attention logits before the softmax.
    """

    budget: int
    window: int
    protected: int
    sinks: int
    smoothing: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if not 0 <= self.sinks <= self.protected:
            raise ValueError(
                f"sinks must lie between 0 and protected={self.protected}, got {self.sinks}"
            )
        if self.window + self.protected > self.budget:
            raise ValueError(
                f"budget={self.budget} is less than window + protected = "
                f"{self.window} + {self.protected}"
            )
        if self.smoothing < 1 or self.smoothing % 2 == 0:
            raise ValueError(f"smoothing must be odd and positive, got {self.smoothing}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


@dataclass(frozen=True)
class Candidates:
    """What one eviction of one KV head chooses from: all but the window, in order of position.

    Attributes:
        step: Position of the token whose step is about to run.
        layer: Index of the layer.
        kv_head: Index of the KV head in its layer.
        positions: [n], int64, ascending.
        scores: [n], float32, smoothed attention, mean over window queries and query heads.
        ranges: [n], float32, value range, +inf at the sinks.
        protected: P, how many to keep for their range.
        keep: T - W, how many to keep in all.
        sinks: Positions below it are sinks.
        eviction_index: How many evictions the sequence has had before.
        keys: [n, D], float32, after RoPE.
        values: [n, D], float32.
        queries: [G, W, D], float32, after RoPE, of the window.
        window_keys, window_values: [W, D], float32; the keys after RoPE.
        received: [n], float32, attention received so far, summed over queries and query heads. Of
            the queries before the first eviction the last W count, and all of those that follow.
    """

    step: int
    layer: int
    kv_head: int
    positions: torch.Tensor
    scores: torch.Tensor
    ranges: torch.Tensor
    protected: int
    keep: int
    sinks: int
    eviction_index: int
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    window_keys: torch.Tensor
    window_values: torch.Tensor
    received: torch.Tensor


Selector = Callable[[Candidates], torch.Tensor]
"""Maps candidates to the indices, [T - W] int64 in any order, of those that survive."""

Margins = Callable[[Candidates], tuple[float, float]]
"""How clear the two cuts of a selection are, see `selection_margins`."""


def attention_scores(
    queries: torch.Tensor, keys: torch.Tensor, *, smoothing: int = 1, temperature: float = 1.0
) -> torch.Tensor:
    """Attention that the window pays to every candidate.

    a[g, j] = mean over w of softmax_j(q[g, w] . k[j] / (sqrt(D) * temperature)), then average
    pooling of each a[g] over positions (stride 1, the zeros of the padding count), then the mean
    over g. The softmax runs over the candidates only.

    Args:
        queries: [G, W, D], float32, after RoPE.
        keys: [n, D], float32, after RoPE, in order of position.
        smoothing: Odd width of the pooling; 1 is off.
        temperature: Divides the logits.

    Returns:
        [n], float32.
    """
    head_dim = queries.shape[-1]
    logits = queries @ keys.T / (head_dim**0.5 * temperature)  # [G, W, n]
    attention = logits.softmax(dim=-1).mean(dim=1)  # [G, n]
    if smoothing > 1:
        attention = F.avg_pool1d(attention, smoothing, stride=1, padding=smoothing // 2)
    return attention.mean(dim=0)


def value_ranges(values: torch.Tensor, positions: torch.Tensor, sinks: int) -> torch.Tensor:
    """r[j] = max_d v[j, d] - min_d v[j, d], and +inf where the position is that of a sink.

    Args:
        values: [n, D], float32.
        positions: [n], int64, true positions.
        sinks: Positions below it are sinks.

    Returns:
        [n], float32.
    """
    ranges = values.amax(dim=-1) - values.amin(dim=-1)
    return ranges.masked_fill(positions < sinks, float("inf"))


def split_protected(candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the P largest ranges, [P] int64, and of the rest, [n - P] int64 ascending."""
    order = candidates.ranges.sort(descending=True, stable=True).indices
    protected, rest = order[: candidates.protected], order[candidates.protected :]
    return protected, rest.sort().values


def select_greedy(candidates: Candidates) -> torch.Tensor:
    """Keep the protected, and of the rest the T - W - P largest scores."""
    protected, rest = split_protected(candidates)
    best = candidates.scores[rest].sort(descending=True, stable=True).indices
    return torch.cat([protected, rest[best[: candidates.keep - candidates.protected]]])


def sampling_selector(generator: torch.Generator | None = None) -> Selector:
    """Keep the protected, and of the rest T - W - P drawn in proportion to the scores."""

    def select(candidates: Candidates) -> torch.Tensor:
        protected, rest = split_protected(candidates)
        count = candidates.keep - candidates.protected
        drawn = draw_without_replacement(candidates.scores[rest], count, generator)
        return torch.cat([protected, rest[drawn]])

    return select


def draw_without_replacement(
    weights: torch.Tensor, count: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw one index after another, each in proportion to the weights not yet drawn.

    Every draw inverts the cumulative weights: no Gumbel noise and no exponential race, so that this
    shares nothing with the implementations that it judges. Indices of weight zero come last, in
    ascending order, and only if the others do not suffice.

    Args:
        weights: [n], non-negative, any floating dtype (the draws are made in float64).
        count: How many to draw, at most n.
        generator: Source of randomness; torch's default one if None.

    Returns:
        [count], int64, in the order of the draws.
    """
    if not 0 <= count <= weights.numel():
        raise ValueError(f"cannot draw {count} of {weights.numel()}")
    if not (weights >= 0).all() or not weights.isfinite().all():
        raise ValueError("weights must be finite and non-negative")
    remaining = weights.double().clone()
    drawn: list[int] = []
    for _ in range(min(count, int((weights > 0).sum()))):
        cumulative = remaining.cumsum(dim=0)
        point = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
        index = int(torch.searchsorted(cumulative, point, right=True))
        drawn.append(index)
        remaining[index] = 0
    zeros = (weights == 0).nonzero().flatten().tolist()
    return torch.tensor(drawn + zeros[: count - len(drawn)], dtype=torch.int64)


def selection_margins(candidates: Candidates) -> tuple[float, float]:
    """How clear the two cuts of the greedy selection are, relative to what they lie between.

    The gap between the last one kept and the next, over the larger of the two sizes.

    A margin at the level of rounding (1e-5, say) means that a correct implementation may cut
    elsewhere. Exact ties are not exotic: in layer 0 a value depends on the token alone, so tokens
    that repeat have the same range. A cut that cuts nothing has the margin +inf.

    Returns:
        The margins of the value range and of the scores among the rest.
    """
    _, rest = split_protected(candidates)
    return (
        relative_margin(candidates.ranges, candidates.protected),
        relative_margin(candidates.scores[rest], candidates.keep - candidates.protected),
    )


def relative_margin(values: torch.Tensor, kept: int) -> float:
    """How clear it is which `kept` of the values are the largest, see `selection_margins`."""
    if not 0 < kept < values.numel():
        return float("inf")
    last, first_out = values.sort(descending=True).values[kept - 1 : kept + 1].tolist()
    if last == first_out:
        return 0.0
    if last == float("inf"):
        return last
    return (last - first_out) / max(abs(last), abs(first_out))
