"""An eviction policy that keeps the tokens whose keys have the smallest norm.

Keys with a small norm tend to receive much attention: Devoto et al., "A Simple and Effective L2
Norm-Based Strategy for KV Cache Compression" (arXiv 2406.11430).
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
        """Return the negative norm of each key: [H, n] from keys [H, D, n]."""
        return -candidates.keys.norm(p=self.order, dim=1)
