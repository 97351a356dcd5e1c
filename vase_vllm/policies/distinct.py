"""Keeps the tokens whose keys and values the rest of the text does not have."""

from collections.abc import Callable
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
    :func:`whitened_length` of the value beside the window's values. The rest are kept for the
    attention that the window pays them. Nothing is drawn.

    The values are compared with the window's because the window is a fair sample of the text. The
    candidates are not: they have survived for being distinct.

    Operations for n candidates of one KV head of size D, multiplications and additions counted
    apart: 2 W n D + 2 W^2 D for the whitening, beside the 2 G W n D of the attention.
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
        length = whitened_length(candidates.window_values, self.ridge)
        # All values at once: on packed pages the products with parts take twice the time.
        values = candidates.values
        of_values = value_range(values) * length(values)
        of_keys = 1 - mean_similarity(candidates.keys)
        return vase_priority(
            self.attention(candidates),
            of_keys * of_values,
            None,
            limits.fixed,
            self.num_protected(limits),
        )


def whitened_length(sample: torch.Tensor, ridge: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The lengths of vectors after a whitening, which shortens the directions that a sample has.

    The squared length of ``x`` is ``x^T (Y^T Y + r I)^-1 x``, where the rows of Y are the sample
    and r is ``ridge`` times the mean eigenvalue of ``Y^T Y``. For a row of Y itself this is its
    ridge leverage score (Alaoui and Mahoney, arXiv 1411.0306). By Woodbury's identity it is
    ``(|x|^2 - |L^-1 Y x|^2) / r`` with ``L L^T = Y Y^T + r I``: m numbers of each vector in the
    place of D. The difference loses at most the digits of ``(largest eigenvalue + r) / r``, which
    is below ``D / ridge + 1``.

    The second vector is the shorter one, in a direction that the sample does not have:

    >>> sample = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [-2.0, 0.0], [1.0, 0.0]]])
    >>> whitened_length(sample, ridge=0.1)(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]))
    tensor([[0.6172, 1.4142]])

    Args:
        sample: [H, m, D] fp32. Rows that are not finite have no part in it.
        ridge: above 0.

    Returns:
        From [H, n, D] to [H, n], fp32.
    """
    is_finite = sample.norm(dim=-1, keepdim=True).isfinite()
    sample = sample.where(is_finite, 0)
    # Of a sample of zeros there is no eigenvalue above 0, and what is left is the plain length.
    floor = (ridge * sample.square().sum(dim=(1, 2)) / sample.shape[-1]).clamp_min(1e-8)[:, None]
    gram = sample @ sample.transpose(-1, -2)
    gram.diagonal(dim1=-2, dim2=-1).add_(floor)
    # Unlike cholesky, cholesky_ex neither raises nor waits for a GPU to say whether it succeeded.
    basis = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, sample, upper=False)

    def length(vectors: torch.Tensor) -> torch.Tensor:
        shortened = (vectors @ basis.transpose(-1, -2)).square().sum(dim=-1)
        return ((vectors.square().sum(dim=-1) - shortened) / floor).clamp_min(0).sqrt()

    return length
