"""What one layer holds after its last eviction, in a few numbers."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from vase_vllm.tools.inspection.kept_positions import LayerHistory, Status

LARGE_SHARE = 0.1
"""Share of the positions that counts as having large values."""


@dataclass(frozen=True)
class LayerSummary:
    """Means over KV heads, after the last eviction of the sequence.

    Attributes:
        sinks, protected, ranked, window: tokens held by a head, by the reason why.
        mean_age: of the tokens held, in tokens: how far behind the next token they are.
        overlap: of any two heads in what each chose, sinks and window left out: tokens that both
            hold over tokens that either holds (Jaccard). None with a single head.
        overlap_by_chance: the same if each head had chosen uniformly among all earlier tokens.
        held: share of all tokens older than the window that are held, sinks left out.
        large_held: the same of the tenth of them with the largest value ranges in that head.
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
    """Sum up a layer's last eviction."""
    status = history.status[-1]
    num_heads, num_positions = status.shape
    held = status != Status.ABSENT
    age = num_positions - np.arange(num_positions)
    # What the policy had to choose among.
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
        # Two sets of k out of n share k * k / n on average.
        overlap_by_chance=float(num_chosen / (2 * num_old - num_chosen)),
        held=float(chosen.mean()),
        large_held=float(np.take_along_axis(chosen, large, axis=-1).mean()),
    )
