"""Summarises in a few numbers what one layer holds after its last eviction."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from vase_vllm.tools.inspection.kept_positions import LayerHistory, Status

LARGE_SHARE = 0.1
"""Share of the positions whose value ranges count as large."""


@dataclass(frozen=True)
class LayerSummary:
    """Means over KV heads, after the last eviction of the sequence.

    Attributes:
        sinks, protected, ranked, window: number of tokens that a head holds for this reason.
        mean_age: mean distance of the tokens held from the next token, in tokens.
        overlap: Jaccard index of the tokens that two heads hold, without sinks and window, as the
            mean over all pairs of heads: tokens that both hold over tokens that either holds. None
            if there is a single head.
        overlap_by_chance: the same for heads that choose uniformly among all earlier tokens.
        held: share of all tokens older than the window that are held, without the sinks.
        large_held: the same share among the tenth of them with the largest value ranges in that
            head.
    """

    sinks: float
    protected: float
    ranked: float
    window: float
    mean_age: float
    overlap: float | None
    overlap_by_chance: float
    held: float
    large_held: float


def summarise(history: LayerHistory) -> LayerSummary:
    """Summarise the state of a layer after its last eviction."""
    status = history.status[-1]
    num_heads, num_positions = status.shape
    held = status != Status.ABSENT
    age = num_positions - np.arange(num_positions)
    # The candidates of the policy, without the sinks.
    old = ~np.isin(status[0], (Status.SINK, Status.WINDOW))
    chosen, num_old = held[:, old], int(old.sum())
    num_large = max(1, round(LARGE_SHARE * num_old))
    large = np.argsort(-history.value_range[:, old], axis=-1, kind="stable")[:, :num_large]
    num_chosen = chosen.sum(axis=-1).mean()
    overlaps = [
        (chosen[a] & chosen[b]).sum() / max((chosen[a] | chosen[b]).sum(), 1)
        for a, b in combinations(range(num_heads), 2)
    ]
    counts = {kind: float((status == kind).sum(axis=-1).mean()) for kind in Status}
    return LayerSummary(
        sinks=counts[Status.SINK],
        protected=counts[Status.PROTECTED],
        ranked=counts[Status.RANKED],
        window=counts[Status.WINDOW],
        mean_age=float((held * age).sum() / held.sum()),
        overlap=float(np.mean(overlaps)) if overlaps else None,
        # Two random sets of k out of n share k * k / n elements on average.
        overlap_by_chance=float(num_chosen / (2 * num_old - num_chosen)),
        held=float(chosen.mean()),
        large_held=float(np.take_along_axis(chosen, large, axis=-1).mean()),
    )
