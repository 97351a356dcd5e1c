"""StreamingLLM's rule (arXiv 2309.17453): the sinks and the newest tokens."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from cachetools import LRUCache

from vase_vllm.kernels.parameters import EvictionLimits, EvictionParameters
from vase_vllm.policies.base import Policy
from vase_vllm.policies.candidates import Candidates


class StreamingPolicy(Policy):
    """Keeps the sinks and the newest tokens (StreamingLLM, arXiv 2309.17453)."""

    name: ClassVar[str] = "streaming"

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """See :meth:`Policy.priority`."""
        positions = slot_positions(candidates.limits, candidates.first, candidates.eviction_index)
        order = torch.from_numpy(positions[: candidates.num]).to(candidates.queries.device)
        return order.double().repeat(len(candidates.queries), 1)

    def fused(self, limits: EvictionLimits) -> EvictionParameters:
        """See :meth:`Policy.fused`."""
        return EvictionParameters.of(limits, sampling="greedy", scoring="age")

    def slot_priority(
        self,
        limits: Sequence[EvictionLimits],
        first: np.ndarray,
        eviction_index: np.ndarray,
        num_candidates: int,
    ) -> np.ndarray:
        """The positions of the candidates; see :meth:`Policy.slot_priority`.

        >>> limits = [EvictionLimits(budget=4, window=2, sinks=1)] * 2
        >>> first, eviction_index = np.array([8, 8]), np.array([0, 1])
        >>> StreamingPolicy().slot_priority(limits, first, eviction_index, num_candidates=6)
        array([[0, 1, 2, 3, 4, 5],
               [0, 5, 6, 7, 0, 0]], dtype=int32)
        """
        priority = np.zeros((len(first), num_candidates), dtype=np.int32)
        sequences = zip(priority, limits, first.tolist(), eviction_index.tolist(), strict=True)
        for row, of_row, first_eviction, index in sequences:
            if first_eviction:
                positions = slot_positions(of_row, first_eviction, index)[: -of_row.window]
                row[: len(positions)] = positions
        return priority


_KNOWN: LRUCache[tuple[EvictionLimits, int, int], np.ndarray] = LRUCache(maxsize=2048)
"""Results of :func:`slot_positions`, for more sequences than may run at once."""


def slot_positions(limits: EvictionLimits, first: int, eviction_index: int) -> np.ndarray:
    """Positions of the tokens in all slots just before an eviction, where the newest always stayed.

    They follow from the schedule, for this policy keeps the same tokens in all heads.

    The first eviction, at position 8, leaves tokens 0, 5, 6 and 7; tokens 8 and 9 come after it:

    >>> slot_positions(EvictionLimits(budget=4, window=2, sinks=1), first=8, eviction_index=1)
    array([0, 5, 6, 7, 8, 9], dtype=int32)

    Args:
        limits: of every eviction.
        first: position of the sequence's first eviction.
        eviction_index: evictions that the sequence has had before.

    Returns:
        [slots] int32; not to be written to.
    """
    index = eviction_index
    while index and (limits, first, index) not in _KNOWN:
        index -= 1
    positions = _KNOWN[limits, first, index] if index else np.arange(first, dtype=np.int32)
    for done in range(index, eviction_index):
        positions = _after_eviction(limits, positions)
        newest = first + done * limits.window
        new = np.arange(newest, newest + limits.window, dtype=np.int32)
        positions = _KNOWN[limits, first, done + 1] = np.concatenate([positions, new])
    return positions


def _after_eviction(limits: EvictionLimits, positions: np.ndarray) -> np.ndarray:
    """Drop all but the sinks and the newest, and move survivors as every eviction does: [T]."""
    budget, fixed = limits.budget, limits.fixed
    oldest_kept = np.sort(positions)[fixed + len(positions) - budget]
    keep = (positions >= oldest_kept) | (positions < fixed)
    after = positions[:budget].copy()
    after[~keep[:budget]] = positions[budget:][keep[budget:]]
    return after
