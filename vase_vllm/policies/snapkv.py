"""SnapKV's ranking (arXiv 2404.14469), applied at every eviction of a decoding sequence."""

from typing import ClassVar

import torch

from vase_vllm.kernels.parameters import EvictionLimits, EvictionParameters
from vase_vllm.policies.base import AttentionPolicy
from vase_vllm.policies.candidates import Candidates


class SnapKVPolicy(AttentionPolicy):
    """Keeps the tokens that the window attends to most (SnapKV, arXiv 2404.14469)."""

    name: ClassVar[str] = "snapkv"

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """See :meth:`Policy.priority`."""
        return self.attention(candidates)

    def fused(self, limits: EvictionLimits) -> EvictionParameters:
        """See :meth:`Policy.fused`."""
        return EvictionParameters.of(
            limits, smoothing=self.smoothing, temperature=self.temperature, sampling="greedy"
        )
