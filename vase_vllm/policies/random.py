"""Uniformly random eviction: the baseline of every other policy."""

from typing import ClassVar

import torch

from vase_vllm.kernels.parameters import EvictionLimits, EvictionParameters
from vase_vllm.policies.base import Policy
from vase_vllm.policies.candidates import Candidates


class RandomPolicy(Policy):
    """Keeps tokens drawn uniformly at random."""

    name: ClassVar[str] = "random"

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """See :meth:`Policy.priority`."""
        return candidates.draws.gumbel()

    def fused(self, limits: EvictionLimits) -> EvictionParameters:
        """See :meth:`Policy.fused`."""
        return EvictionParameters.of(limits, sampling="gumbel", scoring="uniform")
