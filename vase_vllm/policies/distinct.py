"""Keeps what is unlike the rest: the product of the leverage scores of a token's key and value."""

from typing import ClassVar

import torch
from pydantic import Field

from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.kernels.torch_eviction import largest, value_range
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.protecting import ProtectingPolicy, check_fraction, token_count


class DistinctPolicy(ProtectingPolicy):
    """Keeps tokens with large value ranges, tokens unlike all others, then the most attended ones.

    What resembles its surroundings can be lost without much harm, for its neighbours say nearly the
    same; a fact that is stated once cannot. ``protected`` tokens are kept for their value range as
    by VaSE, ``distinct`` ones for the product of the :func:`leverage` of their key and of their
    value, the rest for the attention that the window pays them. Nothing is drawn.

    Operations for n candidates of one KV head of size D: 3 n D^2 for the key and as many for the
    value, multiplications and additions counted apart, beside the 2 G W n D of the attention.
    """

    name: ClassVar[str] = "distinct"

    distinct: int | float = Field(default=0.25, ge=0)
    """Tokens kept for being unlike all others: a fraction of the budget, or a count."""
    ridge: float = Field(default=0.1, ge=1e-4, le=1e4)
    """Added to the eigenvalues of the keys' and of the values' Gram matrix, in multiples of their
    mean."""
    smoothing: int = Field(default=1, ge=1)
    """Width of the average pooling of the attention over slots; 1 is off."""

    def num_distinct(self, limits: EvictionLimits) -> int:
        """``distinct`` as a count of tokens."""
        return token_count(self.distinct, limits)

    def check(self, limits: EvictionLimits) -> None:
        """See :meth:`Policy.check`."""
        super().check(limits)
        check_fraction("distinct", self.distinct)
        both = (protected := self.num_protected(limits)) + self.num_distinct(limits)
        if both > limits.budget - limits.window:
            raise ValueError(
                f"distinct ({self.num_distinct(limits)} tokens) and protected ({protected}) must "
                f"together be at most budget - window ({limits.budget - limits.window}): lower "
                "one of them or raise budget"
            )

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """See :meth:`Policy.priority`."""
        limits = candidates.limits
        ranges = candidates.of_values(value_range)
        ranges[:, : limits.fixed] = torch.inf
        protected = largest(ranges, self.num_protected(limits))
        of_keys = leverage(candidates.keys, self.ridge)
        of_values = leverage(candidates.values.transpose(-1, -2), self.ridge)
        others = (of_keys * of_values).masked_fill(protected, -torch.inf)
        protected |= largest(others, self.num_distinct(limits))
        return self.attention(candidates).masked_fill(protected, torch.inf)


def leverage(vectors: torch.Tensor, ridge: float) -> torch.Tensor:
    """Ridge leverage score of each vector's direction: how badly the others can express it.

    ``l_j = x_j^T (X X^T + r I)^-1 x_j`` with the vectors ``x_j`` of norm 1 as columns of X (Alaoui
    and Mahoney, arXiv 1411.0306), where r is ``ridge`` times the mean eigenvalue of ``X X^T``. It
    lies between 0 and 1. A vector that is not finite has leverage 0, and no part in the others'.

    Of four vectors the last has a direction of its own:

    >>> vectors = torch.tensor([[[1.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.5]]])
    >>> leverage(vectors, ridge=0.1)
    tensor([[0.3125, 0.3125, 0.3125, 0.8333]])

    Args:
        vectors: [H, D, n] fp32.
        ridge: above 0.

    Returns:
        [H, n] fp32.
    """
    unit = (vectors / (vectors.norm(dim=1, keepdim=True) + 1e-8)).nan_to_num(0, 0, 0)
    gram = unit @ unit.transpose(-1, -2)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Vectors that are all zero have no eigenvalue above 0: their leverage shall be 0 all the same.
    diagonal += (ridge * diagonal.mean(dim=-1, keepdim=True)).clamp_min(1e-8)
    # Unlike cholesky, cholesky_ex neither raises nor waits for a GPU to say whether it succeeded.
    lower = torch.linalg.cholesky_ex(gram).L
    return torch.linalg.solve_triangular(lower, unit, upper=False).square().sum(dim=1)
