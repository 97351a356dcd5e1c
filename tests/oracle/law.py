"""The exact law of sequential draws without replacement, and a chi-square test against it.

Of the items not yet drawn, each draw takes one with probability proportional to its weight. Only
the set that results matters, not the order of the draws. Gumbel-top-k of the log-weights has this
law.
"""

from collections.abc import Mapping, Sequence

import torch

ItemSet = tuple[int, ...]
"""Indices of the items drawn, ascending."""

MAX_ITEMS = 16
MIN_EXPECTED_COUNT = 5.0


def set_probabilities(weights: Sequence[float], k: int) -> dict[ItemSet, float]:
    """Probability of every set of k items.

    P(S) = sum over i in S of P(S without i) * w[i] / (sum of w - sum of w over S without i), from
    the empty set upwards: all orders of the draws are summed without listing them.

    Args:
        weights: n non-negative weights, of any sum; n is at most `MAX_ITEMS`.
        k: How many to draw, at most the number of positive weights.

    Returns:
        The probability of each set that is possible; they sum to 1.
    """
    weights = [float(w) for w in weights]
    if len(weights) > MAX_ITEMS:
        raise ValueError(f"exact enumeration takes at most {MAX_ITEMS} items, got {len(weights)}")
    if not all(0 <= w < float("inf") for w in weights):
        raise ValueError("weights must be finite and non-negative")
    if not 0 <= k <= sum(w > 0 for w in weights):
        raise ValueError(f"cannot draw {k} of {sum(w > 0 for w in weights)} positive weights")
    sets: dict[ItemSet, float] = {(): 1.0}
    for _ in range(k):
        larger: dict[ItemSet, float] = {}
        for items, probability in sets.items():
            left = [i for i, w in enumerate(weights) if w > 0 and i not in items]
            total = sum(weights[i] for i in left)
            for i in left:
                key = tuple(sorted((*items, i)))
                larger[key] = larger.get(key, 0.0) + probability * weights[i] / total
        sets = larger
    return sets


def inclusion_probabilities(weights: Sequence[float], k: int) -> list[float]:
    """Probability of each item to be among the k drawn, n floats that sum to k."""
    inclusion = [0.0] * len(weights)
    for items, probability in set_probabilities(weights, k).items():
        for i in items:
            inclusion[i] += probability
    return inclusion


def chi_square_of_sets(observed: Mapping[ItemSet, int], expected: Mapping[ItemSet, float]) -> float:
    """Pearson's chi-square test of counts of sets against their probabilities.

    Sets expected fewer than `MIN_EXPECTED_COUNT` times are pooled into one cell, which takes in the
    rarest other sets until it reaches that number itself.

    Args:
        observed: How often each set (indices ascending) occurred.
        expected: The probability of every set that is possible, which sum to 1.

    Returns:
        The p-value; 0 if a set occurred that is not possible.
    """
    if abs(sum(expected.values()) - 1) > 1e-9:
        raise ValueError(f"the probabilities sum to {sum(expected.values())}, not to 1")
    if any(count and not expected.get(items, 0.0) for items, count in observed.items()):
        return 0.0
    total = sum(observed.values())
    cells: list[tuple[float, int]] = []
    pooled_expected, pooled_observed = 0.0, 0
    for items, probability in sorted(expected.items(), key=lambda item: item[1]):
        mean, count = total * probability, observed.get(items, 0)
        if mean < MIN_EXPECTED_COUNT or 0 < pooled_expected < MIN_EXPECTED_COUNT:
            pooled_expected, pooled_observed = pooled_expected + mean, pooled_observed + count
        else:
            cells.append((mean, count))
    if pooled_expected:
        cells.append((pooled_expected, pooled_observed))
    if len(cells) < 2:
        raise ValueError(f"{total} observations are too few: fewer than two cells are left")
    statistic = sum((count - mean) ** 2 / mean for mean, count in cells)
    degrees = len(cells) - 1
    survival = torch.special.gammaincc(
        torch.tensor(degrees / 2, dtype=torch.float64),
        torch.tensor(statistic / 2, dtype=torch.float64),
    )
    return survival.item()
