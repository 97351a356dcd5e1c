"""Keeps the tokens whose keys and values the rest of the text does not have."""

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field

from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.kernels.torch_eviction import value_range, vase_priority
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.protecting import ProtectingPolicy
from vase_vllm.policies.received import mean_received_attention
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
    memory: float = Field(default=0.0, ge=0, le=1)
    """How much the attention of earlier windows counts: what is left of it at each eviction. Above
    0 the rest is kept for the mean attention that a token has received since it came."""

    @property
    def num_numbers(self) -> int:
        """See :class:`Policy`: the attention received, and the queries that it is of."""
        return 2 if self.memory else 0

    def check(self, limits: EvictionLimits) -> None:
        """See :meth:`Policy.check`."""
        super().check(limits)
        if self.memory and self.smoothing > 1:
            raise ValueError(
                f"smoothing ({self.smoothing}) pools the attention of the last window alone: set "
                "smoothing 1 or memory 0"
            )

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """See :meth:`Policy.priority`; of tokens of which nothing has been kept so far."""
        return self.rank(candidates, None)[0]

    def rank(
        self, candidates: Candidates, numbers: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`Policy.rank`."""
        if not self.memory:
            return self._priority(candidates, self.attention(candidates)), None
        after = mean_received_attention(candidates, numbers, self.memory, self.temperature)
        received, asked = after[..., : candidates.num].unbind(dim=1)
        return self._priority(candidates, received / asked), after

    def _priority(self, candidates: Candidates, attention: torch.Tensor) -> torch.Tensor:
        """The protected tokens, then the largest ``attention``: [H, n]."""
        limits = candidates.limits
        length = whitened_length(candidates.window_values, self.ridge)
        # All values at once: on packed pages the products with parts take twice the time.
        values = candidates.values
        of_values = value_range(values) * length(values)
        of_keys = 1 - mean_similarity(candidates.keys)
        return vase_priority(
            attention,
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
        shortened = products(vectors, basis.transpose(-1, -2)).square().sum(dim=-1)
        return ((vectors.square().sum(dim=-1) - shortened) / floor).clamp_min(0).sqrt()

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
