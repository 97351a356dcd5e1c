"""Keeps the tokens whose keys and values the rest of the text does not have."""

from typing import ClassVar

import torch
from pydantic import Field

from vase_vllm.kernels.torch_eviction import value_range, vase_priority
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.protecting import ProtectingPolicy
from vase_vllm.policies.rkv import mean_similarity


class DistinctPolicy(ProtectingPolicy):
    """Keeps the tokens that are least like the text around them, then the most attended ones.

    What resembles the rest of a text can be lost without much harm; a fact that is stated once
    cannot. ``protected`` tokens are kept for the product of three numbers: 1 less the mean cosine
    similarity of the key to the others (R-KV's redundancy), the value range (VaSE's), and the
    length of the value after the :func:`whitening` of the window's values. The rest are kept for
    the attention that the window pays them. Nothing is drawn.

    The values are compared with the window's because the window is a fair sample of the text. The
    candidates are not: they have survived for being distinct.

    Operations for n candidates of one KV head of size D, multiplications and additions counted
    apart: 2 n D^2 + 2 W D^2 for the whitening, beside the 2 G W n D of the attention.
    """

    name: ClassVar[str] = "distinct"

    protected: int | float = Field(default=0.375, ge=0)
    """Tokens kept for their distinct keys and values: a fraction of the budget, or a count. The
    sinks are among them."""
    ridge: float = Field(default=0.1, ge=1e-4, le=1e4)
    """How much a value counts in directions that the window's values do not have: the larger, the
    less. In multiples of the mean eigenvalue of their Gram matrix."""
    smoothing: int = Field(default=1, ge=1)
    """Width of the average pooling of the attention over slots; 1 is off."""

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """See :meth:`Policy.priority`."""
        limits = candidates.limits
        matrix = whitening(candidates.window_values, self.ridge)
        of_values = candidates.of_values(
            lambda values: value_range(values) * (values.float() @ matrix).norm(dim=-1)
        )
        of_keys = 1 - mean_similarity(candidates.keys)
        return vase_priority(
            self.attention(candidates),
            of_keys * of_values,
            None,
            limits.fixed,
            self.num_protected(limits),
        )


def whitening(sample: torch.Tensor, ridge: float) -> torch.Tensor:
    """A matrix that shortens vectors in the directions that a sample has.

    The squared length of ``x M`` is ``x^T (Y^T Y + r I)^-1 x``, where the rows of Y are the sample
    and r is ``ridge`` times the mean eigenvalue of ``Y^T Y``. For a row of Y itself this is its
    ridge leverage score (Alaoui and Mahoney, arXiv 1411.0306).

    The second vector is the shorter one, in a direction that the sample does not have:

    >>> sample = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [-2.0, 0.0], [1.0, 0.0]]])
    >>> (torch.tensor([[2.0, 0.0], [0.0, 1.0]]) @ whitening(sample, ridge=0.1)).norm(dim=-1)
    tensor([[0.6172, 1.4142]])

    Args:
        sample: [H, m, D] fp32. Rows that are not finite have no part in it.
        ridge: above 0.

    Returns:
        [H, D, D] fp32.
    """
    is_finite = sample.norm(dim=-1, keepdim=True).isfinite()
    sample = sample.where(is_finite, 0)
    gram = sample.transpose(-1, -2) @ sample
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Of a sample of zeros there is no eigenvalue above 0, and what is left is the plain length.
    diagonal += (ridge * diagonal.mean(dim=-1, keepdim=True)).clamp_min(1e-8)
    # Unlike cholesky, cholesky_ex neither raises nor waits for a GPU to say whether it succeeded.
    lower = torch.linalg.cholesky_ex(gram).L
    identity = torch.eye(gram.shape[-1], device=gram.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).transpose(-1, -2)
