"""Strata in plain torch; ``strata.py`` is the same in Triton."""

import torch


def by_strata(priority: torch.Tensor, positions: torch.Tensor, strata: int) -> torch.Tensor:
    """Rank within parts of equally many tokens, so that each keeps as many as the others.

    Tokens of priority +inf stay what they are and belong to no part. The best of each part come
    first, ordered among each other by their priority, then the second best, and so on.

    Two parts, of the positions 0 to 2 and of those from 4 on. Two more than the one that stays are
    0.9 and 0.3, the best of each part; a third one is 0.8, the better of the second best:

    >>> priority = torch.tensor([[0.1, 0.3, 0.2, torch.inf, 0.9, 0.8, 0.7]])
    >>> by_strata(priority, torch.arange(7.0)[None], strata=2)
    tensor([[-22.,  -4., -13.,  inf,  -1., -10., -19.]], dtype=torch.float64)

    Args:
        priority: [H, n]; NaN counts as -inf.
        positions: [H, n].
        strata: number of parts.

    Returns:
        [H, n] fp64.
    """
    num = priority.shape[-1]
    is_ranked = priority != torch.inf
    stratum = strata_of(is_ranked, positions, strata)
    best_first = priority.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best_first = best_first.argsort(dim=-1, descending=True, stable=True)
    # In this order, how many of a token's part come before it.
    parts, ranked = stratum.gather(-1, best_first), is_ranked.gather(-1, best_first)
    rank = torch.zeros_like(parts)
    for part in range(strata):
        of_part = (parts == part) & ranked
        rank += of_part * (of_part.cumsum(dim=-1) - 1)
    # Whole numbers, exact in fp64: by the rank in the part, then by the priority.
    result = torch.empty_like(priority, dtype=torch.float64)
    result.scatter_(-1, best_first, -(rank * (num + 1) + _indices(rank)).double())
    return result.masked_fill(~is_ranked, torch.inf)


def strata_of(is_ranked: torch.Tensor, positions: torch.Tensor, strata: int) -> torch.Tensor:
    """The part that each ranked token belongs to, counted from the oldest one: [H, n] int64.

    >>> strata_of(torch.tensor([[True, True, False, True, True]]), torch.arange(5.0)[None], 2)
    tensor([[0, 0, 2, 1, 1]])

    Args:
        is_ranked: [H, n] bool; the others get numbers from ``strata`` on.
        positions: [H, n].
        strata: number of parts.
    """
    # Those that are not ranked come last by position.
    order = positions.masked_fill(~is_ranked, torch.inf).argsort(dim=-1, stable=True)
    place = torch.empty_like(order).scatter_(-1, order, _indices(order))
    return place * strata // is_ranked.sum(dim=-1, keepdim=True).clamp_min(1)


def _indices(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(like.shape[-1], device=like.device).expand_as(like)
