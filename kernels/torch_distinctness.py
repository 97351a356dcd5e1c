"""How unlike those around them values are, in plain fp32 torch.

What the policy ``distinct`` protects by, and the reference of the kernels in ``distinctness.py``.

Shapes: H KV heads, W window, n candidates, D head size.
"""

from collections.abc import Callable

import torch

from vase_vllm.kernels.torch_eviction import value_range


def distinctness(sample: torch.Tensor, ridge: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """How unlike a sample of values others are: their range, times their whitened length.

    Args:
        sample: [H, m, D] fp32.
        ridge: see :func:`whitened_length`.

    Returns:
        From the values of any tokens, [H, n, D], to [H, n] fp32, not negative.
    """
    length = whitened_length(sample, ridge)

    def of_values(values: torch.Tensor) -> torch.Tensor:
        values = values.float()
        return value_range(values) * length(values)

    return of_values


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
    is_finite = torch.linalg.vector_norm(sample, dim=-1, keepdim=True).isfinite()
    sample = sample.where(is_finite, 0)
    gram = sample @ sample.transpose(-1, -2)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # Of a sample of zeros there is no eigenvalue above 0, and what is left is the plain length.
    floor = (ridge * diagonal.sum(dim=-1) / sample.shape[-1]).clamp_min(1e-8)[:, None]
    diagonal.add_(floor)
    # Unlike cholesky, cholesky_ex neither raises nor waits for a GPU to say whether it succeeded.
    factor = torch.linalg.cholesky_ex(gram).L
    # A third of the time of the same from the left on a CPU.
    basis = torch.linalg.solve_triangular(
        factor.transpose(-1, -2), sample.transpose(-1, -2), upper=True, left=False
    )

    def length(vectors: torch.Tensor) -> torch.Tensor:
        whole = torch.linalg.vector_norm(vectors, dim=-1).square_()
        shortened = torch.linalg.vector_norm(products(vectors, basis), dim=-1).square_()
        return ((whole - shortened) / floor).clamp_min_(0).sqrt_()

    return length


def products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` of each KV head: [H, n, D] and [H, D, m] to [H, n, m].

    On a CPU head by head, which takes half the time of a batched product.
    """
    if left.device.type != "cpu":
        return left @ right
    found = left.new_empty(*left.shape[:2], right.shape[-1])
    for of_head, one, other in zip(found, left, right, strict=True):
        torch.mm(one, other, out=of_head)
    return found
