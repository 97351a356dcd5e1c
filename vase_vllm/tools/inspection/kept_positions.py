"""Follows which positions every KV head holds, from eviction to eviction.

An eviction knows slots only. What lies in them follows from the schedule, for new tokens, and from
``plan_moves``, for survivors; this keeps the account that nothing in the cache needs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch

from vase_vllm.kernels.torch_eviction import plan_moves, value_range
from vase_vllm.policies.candidates import Candidates


class Status(IntEnum):
    """What an eviction made of a position in one KV head."""

    ABSENT = 0
    """Dropped by this eviction or an earlier one, or not there yet."""
    WINDOW = 1
    """Among the newest, which always stay."""
    RANKED = 2
    """Among those that rank highest, by a draw or without."""
    PROTECTED = 3
    """Of infinite priority: no draw could drop it."""
    SINK = 4
    """Among the first, which always stay."""


@dataclass(frozen=True)
class LayerHistory:
    """All evictions of one sequence from one layer: E evictions, H KV heads, P positions.

    Attributes:
        positions: [E] int64, the position of the step that each eviction ran just before, which is
            the number of tokens so far. P is the last of them.
        status: [E, H, P] uint8, a :class:`Status`.
        value_range: [H, P] fp32, largest minus smallest element of the position's value vector; NaN
            in the last window, which has never been up for eviction.
    """

    positions: np.ndarray
    status: np.ndarray
    value_range: np.ndarray


@dataclass
class _Layer:
    """What is known of a layer so far.

    Attributes:
        slots: [H, budget] int64, the position in each slot after the latest eviction.
    """

    slots: torch.Tensor
    value_range: torch.Tensor
    positions: list[int] = field(default_factory=list)
    status: list[torch.Tensor] = field(default_factory=list)


class KeptPositions:
    """An ``EvictionObserver`` that records one sequence at a time, the latest.

    Args:
        layers: indices of the layers whose evictions are recorded.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self._watched = frozenset(layers)
        self._layers: dict[int, _Layer] = {}

    def observe(self, candidates: Candidates, priority: torch.Tensor, keep: torch.Tensor) -> None:
        """See :class:`vase_vllm.worker.evictor.EvictionObserver`."""
        index = candidates.draws.layer
        if index not in self._watched:
            return
        limits = candidates.limits
        priority, keep = priority.cpu(), keep.cpu()
        num_heads = len(keep)
        # The position of the step that comes next: everything before it is cached or dropped.
        position = candidates.first + candidates.eviction_index * limits.window
        if candidates.eviction_index == 0:
            slots = torch.arange(position).repeat(num_heads, 1)
            layer = self._layers[index] = _Layer(slots, torch.empty(num_heads, 0))
        else:
            layer = self._layers[index]
            window = torch.arange(position - limits.window, position).repeat(num_heads, 1)
            slots = torch.cat([layer.slots, window], dim=-1)

        status = torch.full((num_heads, position), Status.ABSENT, dtype=torch.uint8)
        survives = torch.where(priority.isposinf(), Status.PROTECTED, Status.RANKED)
        survives = survives.masked_fill(~keep, Status.ABSENT).to(torch.uint8)
        status.scatter_(1, slots[:, : candidates.num], survives)
        status[:, : limits.sinks] = Status.SINK
        status[:, position - limits.window :] = Status.WINDOW
        layer.status.append(status)
        layer.positions.append(position)

        ranges = torch.full((num_heads, position), torch.nan)
        ranges[:, : layer.value_range.shape[1]] = layer.value_range
        ranges.scatter_(1, slots[:, : candidates.num], candidates.of_values(value_range).cpu())
        layer.value_range = ranges

        head, source, destination = plan_moves(limits.budget, limits.window, keep)
        slots[head, destination] = slots[head, source]
        layer.slots = slots[:, : limits.budget]

    def history(self, layer: int) -> LayerHistory | None:
        """What happened in a layer, or None if it has not evicted."""
        if layer not in self._layers:
            return None
        known = self._layers[layer]
        num_heads, num_positions = known.value_range.shape
        status = np.full(
            (len(known.status), num_heads, num_positions), Status.ABSENT, dtype=np.uint8
        )
        for into, of_eviction in zip(status, known.status, strict=True):
            into[:, : of_eviction.shape[1]] = of_eviction.numpy()
        return LayerHistory(np.array(known.positions), status, known.value_range.numpy())
