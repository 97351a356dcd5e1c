"""In which order survivors lie after an eviction, which the smoothing of scores over slots goes by.

Attention does not depend on it: keys are stored with their positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.kernels.torch_eviction import plan_moves, value_range
from vase_vllm.policies.candidates import Candidates

SlotOrder = Callable[[Candidates, Tensor, Tensor], Tensor]
"""From the candidates, their priority and which of them stay, each [H, n], to the slot before the
eviction of what lies in each slot after it: [H, budget] int64."""


def in_place(candidates: Candidates, priority: Tensor, keep: Tensor) -> Tensor:
    """As in the product: survivors below the budget stay, the others fill the gaps."""
    limits = candidates.limits
    index = torch.arange(limits.budget).repeat(len(keep), 1)
    head, source, destination = plan_moves(limits.budget, limits.window, keep)
    moved = source != destination
    index[head[moved], destination[moved]] = source[moved]
    return index


def by_position(candidates: Candidates, priority: Tensor, keep: Tensor) -> Tensor:
    """Survivors are moved together; they lie by position as long as nothing else moves them."""
    limits = candidates.limits
    survivors = keep.sort(dim=-1, descending=True, stable=True).indices
    return _with_window(survivors, limits)


def authors(candidates: Candidates, priority: Tensor, keep: Tensor) -> Tensor:
    """As in the code of VaSE's authors: the protected ones by falling value range, the others as
    they were drawn, the window."""
    limits = candidates.limits
    ranges = candidates.of_values(value_range)
    ranges[:, : limits.sinks] = torch.inf
    by_range = ranges.sort(dim=-1, descending=True, stable=True).indices
    of_these = priority.gather(-1, by_range).sort(dim=-1, descending=True, stable=True).indices
    return _with_window(by_range.gather(-1, of_these), limits)


def _with_window(candidates_in_order: Tensor, limits: EvictionLimits) -> Tensor:
    num_heads, num_candidates = candidates_in_order.shape
    window = num_candidates + torch.arange(limits.window).repeat(num_heads, 1)
    return torch.cat([candidates_in_order[:, : limits.budget - limits.window], window], dim=-1)
