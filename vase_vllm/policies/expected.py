"""Expected Attention (arXiv 2510.00636): what queries to come are expected to attend to."""

from typing import ClassVar

import torch

from vase_vllm.policies.base import Policy
from vase_vllm.policies.candidates import Candidates


class ExpectedPolicy(Policy):
    """Keeps the tokens that later queries will probably attend to (arXiv 2510.00636).

    Queries to come are taken to be normally distributed, with the mean and the covariance of the
    window's queries. A token's expected attention is weighted with the norm of its value. The
    authors take both from queries before their rotation and rotate them by the positions to come;
    here they are those of the window's queries as they are, at their own positions.
    """

    name: ClassVar[str] = "expected"

    value_norm: bool = True
    """Whether the expected attention is multiplied by the L2 norm of the value."""

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """See :meth:`Policy.priority`."""
        window = candidates.limits.window
        attention = expected_attention(
            candidates.queries, candidates.keys, candidates.scale, window
        )
        if not self.value_norm:
            return attention
        return attention * candidates.of_values(lambda values: values.norm(dim=-1))


def expected_attention(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """Attention that a normally distributed query is expected to pay to each candidate.

    For queries ``q ~ N(m, S)`` the mean of ``exp(q . k * scale)`` is ``exp(mu + var / 2)`` with
    the mean and the variance of the logit ``q . k * scale``. Those are the logits' own mean and
    variance over the window, so that no covariance matrix is needed:

    ``a[j] = mean_g softmax_j(mean_w x_wgj + var_w x_wgj / 2)``, ``x_wgj = q_wg . k_j * scale``.

    What half of the queries want much is worth more than what all of them want half as much:

    >>> queries = torch.tensor([[[2.0, 1.0], [0.0, 1.0]]])  # two of one query head
    >>> keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # two, in columns
    >>> expected_attention(queries, keys, scale=1.0, window=2)
    tensor([[0.6225, 0.3775]])

    Args:
        queries: [H, window * G, D] fp32, window-major.
        keys: [H, D, n] fp32, the candidates' keys with the head dimension first.
        scale: factor on the logits.
        window: queries of each query head.

    Returns:
        [H, n] fp32.
    """
    scores = queries.new_empty(len(queries), keys.shape[-1])
    for head, (of_head, candidates) in enumerate(zip(queries, keys, strict=True)):
        logits = (of_head @ candidates * scale).unflatten(0, (window, -1))
        variance, mean = torch.var_mean(logits, dim=0, correction=0)
        scores[head] = torch.softmax(mean + variance / 2, dim=-1).mean(dim=0)
    return scores
