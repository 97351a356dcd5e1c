"""Records which positions every KV head holds, from eviction to eviction.

An eviction works on slots, and the cache itself stores no positions. The position in each slot
follows from the schedule for new tokens, and from ``plan_moves`` for the tokens that were kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch

from vase_vllm.kernels.torch_eviction import plan_moves, value_range
from vase_vllm.policies.candidates import Candidates


class Status(IntEnum):
    """Status of a position in one KV head after an eviction."""

    ABSENT = 0
    """Evicted by this eviction or an earlier one, or not in the sequence yet."""
    WINDOW = 1
    """One of the newest tokens, which are never evicted."""
    RANKED = 2
    """One of the tokens of highest priority; the priority may include a random draw."""
    PROTECTED = 3
    """The priority is infinite, so the token is kept whatever is drawn."""
    SINK = 4
    """One of the first tokens, which are never evicted."""


@dataclass(frozen=True)
class LayerHistory:
    """All evictions of one sequence in one layer: E evictions, H KV heads, P positions.

    Attributes:
        positions: [E] int64, the position of the step that follows each eviction, which is the
            number of tokens in the sequence at that time. P is the last of them.
        status: [E, H, P] uint8, a :class:`Status` each.
        value_range: [H, P] fp32, largest minus smallest element of the position's value vector; NaN
            in the last window, whose tokens have never been candidates.
    """

    positions: np.ndarray
    status: np.ndarray
    value_range: np.ndarray


@dataclass
class _Layer:
    """The evictions of a layer so far.

    Attributes:
        slots: [H, budget] int64, the position in each slot after the latest eviction.
        value_range: [H, P] fp32, see :class:`LayerHistory`.
        positions: the position of each eviction.
        status: of each eviction, [H, position] uint8.
    """

    slots: torch.Tensor
    value_range: torch.Tensor
    positions: list[int] = field(default_factory=list)
    status: list[torch.Tensor] = field(default_factory=list)


class KeptPositions:
    """An ``EvictionObserver`` that records one sequence at a time.

    The first eviction of another sequence discards what was recorded before.

    Args:
        layers: indices of the layers whose evictions are recorded.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self._watched = frozenset(layers)
        self._layers: dict[int, _Layer] = {}

    def observe(self, candidates: Candidates, priority: torch.Tensor, keep: torch.Tensor) -> None:
        """See :class:`vase_vllm.worker.evictor.EvictionObserver`."""
        (index,) = candidates.draws.layers
        if index not in self._watched:
            return
        limits = candidates.limits
        priority, keep = priority.cpu(), keep.cpu()
        num_heads = len(keep)
        # The position of the next step: every earlier position is either cached or evicted.
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
        status[:, : limits.fixed] = Status.SINK
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
        """All evictions of a layer, or None if there were none."""
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
