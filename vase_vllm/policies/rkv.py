"""R-KV's ranking (arXiv 2505.24133): attention less redundancy."""

from typing import ClassVar

import torch
from pydantic import Field

from vase_vllm.kernels.torch_distinctness import LEAST_LENGTH, key_lengths
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


def mean_similarity(keys: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity of each key to all keys, where its similarity to itself counts as 0.

    The sum over the others is a product with the sum of all normalised keys: n * D operations
    instead of the n * n * D of the similarity matrix.

    Of three keys the first two are alike:

    >>> keys = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]])
    >>> mean_similarity(keys)
    tensor([[0.3333, 0.3333, 0.0000]])

    Args:
        keys: [H, D, n] fp32.

    Returns:
        [H, n] fp32.
    """
    # The sum and the products with it are matrix products with one row each, so that unit vectors
    # are never written.
    length = key_lengths(keys)
    scale = 1 / (length + LEAST_LENGTH)
    total = scale[:, None] @ keys.transpose(-1, -2)
    to_all = (total @ keys)[:, 0] * scale
    to_itself = (length * scale).square()
    return (to_all - to_itself) / keys.shape[-1]
