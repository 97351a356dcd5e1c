"""R-KV's ranking (arXiv 2505.24133): attention less redundancy."""

from typing import ClassVar

import torch
from pydantic import Field

from vase_vllm.kernels.torch_distinctness import mean_similarity
from vase_vllm.policies.base import AttentionPolicy
from vase_vllm.policies.candidates import Candidates


class RKVPolicy(AttentionPolicy):
    """Keeps what is attended to and unlike the rest (R-KV, arXiv 2505.24133)."""

    name: ClassVar[str] = "rkv"

    weight: float = Field(default=0.5, ge=0, le=1, alias="lambda")
    """Weight of the attention; the rest is that of the redundancy."""

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """``lambda * a - (1 - lambda) * softmax(similarity)``; see :meth:`Policy.priority`."""
        redundancy = torch.softmax(mean_similarity(candidates.keys), dim=-1)
        return self.weight * self.attention(candidates) - (1 - self.weight) * redundancy
