"""How unlike the text around it a token is, in plain fp32 torch.

What the policy ``distinct`` protects by, and the reference of the kernels in ``distinctness.py``.

Shapes: H KV heads, W window, n candidates, D head size.
"""

from collections.abc import Callable

import torch

from vase_vllm.kernels.torch_eviction import value_range

LEAST_LENGTH = 1e-8
"""What is added to a key's length, so that a key of zeros is similar to nothing."""
_KEYS_TOGETHER = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Numbers in the keys that are squared at once, by device: 2 and 128 MiB of fp32."""


def distinctness(
    keys: torch.Tensor,
    values: torch.Tensor,
    window_keys: torch.Tensor,
    window_values: torch.Tensor,
    ridge: float,
) -> torch.Tensor:
    """How unlike the window each candidate is: [H, n] fp32, not negative but by rounding.

    The product of three numbers: 1 less the mean cosine similarity of the key to the window's keys,
    the range of the value, and its :func:`whitened_length` beside the window's values.

    Args:
        keys: [H, D, n] fp32.
        values: [H, n, D] fp32.
        window_keys: [H, D, W] fp32.
        window_values: [H, W, D] fp32.
        ridge: see :func:`whitened_length`.
    """
    of_values = value_distinctness(window_values, ridge)(values)
    return (1 - similarity_to(window_keys, keys)) * of_values


def value_distinctness(
    sample: torch.Tensor, ridge: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the values say of it: their range, times their whitened length beside a sample.

    Args:
        sample: [H, m, D] fp32.
        ridge: see :func:`whitened_length`.

    Returns:
        From the values of any tokens, [H, n, D], to [H, n] fp32.
    """
    length = whitened_length(sample, ridge)

    def of_values(values: torch.Tensor) -> torch.Tensor:
        values = values.float()
        return value_range(values) * length(values)

    return of_values


def similarity_to(sample: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity of each key to the keys of a sample.

    The mean over the sample is a product with the mean of its unit vectors.

    >>> sample = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    >>> similarity_to(sample, torch.tensor([[[3.0, 1.0], [0.0, 1.0]]]))
    tensor([[0.5000, 0.7071]])

    Args:
        sample: [H, D, m] fp32. Keys that are not finite, and those of zeros, are similar to none.
        keys: [H, D, n] fp32.

    Returns:
        [H, n] fp32.
    """
    lengths = key_lengths(sample)[:, None]
    units = (sample / (lengths + LEAST_LENGTH)).where(lengths.isfinite(), 0)
    products = units.mean(dim=-1)[:, None] @ keys
    return products[:, 0] / (key_lengths(keys) + LEAST_LENGTH)


def key_lengths(keys: torch.Tensor) -> torch.Tensor:
    """Euclidean length of each key: [H, D, n] to [H, n], fp32."""
    num_together = max(1, _KEYS_TOGETHER[keys.device.type] // keys[0].numel())
    # A fifth of the time of norm(dim=1).
    parts = [(part * part).sum(dim=1) for part in keys.split(num_together)]
    return torch.cat(parts).sqrt_()


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
        shortened = torch.linalg.vector_norm(vectors @ basis, dim=-1).square_()
        return ((whole - shortened) / floor).clamp_min_(0).sqrt_()

    return length
