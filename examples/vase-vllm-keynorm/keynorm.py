"""Keeps the tokens whose keys have the smallest norm.

Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression"
(arXiv 2406.11430): keys of a small norm tend to be attended to much.
"""

from typing import ClassVar

import torch
from pydantic import Field

from vase_vllm.policies import Candidates, Policy


class KeyNormPolicy(Policy):
    """Keeps the tokens whose keys have the smallest norm (arXiv 2406.11430)."""

    name: ClassVar[str] = "keynorm"

    order: float = Field(default=2.0, gt=0)
    """Order of the norm."""

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """The largest priority stays: [H, n] from keys [H, D, n]."""
        return -candidates.keys.norm(p=self.order, dim=1)
