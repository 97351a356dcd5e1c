"""H2O's ranking (arXiv 2306.14048): the attention that a token has received so far."""

from typing import ClassVar

import torch
from pydantic import Field

from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.policies.base import Policy
from vase_vllm.policies.candidates import Candidates


class H2OPolicy(Policy):
    """Keeps the newest tokens and the heavy hitters (H2O, arXiv 2306.14048).

    A heavy hitter is a token that has received much attention, summed over all queries since it
    came. Every query of an output counts; of a prompt's queries those of its last window do, which
    are the ones that are kept. In grouped-query attention the query heads of a KV head add up.
    """

    name: ClassVar[str] = "h2o"
    num_numbers: ClassVar[int] = 2

    recent: int | float = Field(default=0.5, ge=0)
    """Newest tokens that are kept whatever attention they receive, the window included: a fraction
    of the budget, or a count. The authors keep as many as heavy hitters."""
    decay: float = Field(default=1.0, ge=0, le=1)
    """What is left at an eviction of the attention received before the last one; 1 forgets nothing,
    which is H2O, and 0 everything."""

    def num_recent(self, limits: EvictionLimits) -> int:
        """``recent`` as a count of tokens.

        >>> H2OPolicy(recent=0.5).num_recent(EvictionLimits(budget=4096, window=64))
        2048
        """
        if isinstance(self.recent, float):
            return int(self.recent * (limits.budget - limits.kept))
        return self.recent

    def check(self, limits: EvictionLimits) -> None:
        """See :meth:`Policy.check`."""
        if isinstance(self.recent, float) and self.recent > 1:
            raise ValueError(f"recent ({self.recent}) must be a fraction up to 1 or a count")
        num_recent = max(self.num_recent(limits), limits.window)
        if num_recent + limits.sinks > limits.budget:
            raise ValueError(
                f"recent ({num_recent} tokens) and sinks ({limits.sinks}) must be at most budget "
                f"({limits.budget}): lower recent or raise budget"
            )

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """See :meth:`Policy.priority`; of tokens of which nothing has been kept so far."""
        return self.rank(candidates, None)[0]

    def rank(
        self, candidates: Candidates, numbers: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Policy.rank`. The numbers are the attention received, and the position."""
        limits, num = candidates.limits, candidates.num
        received = received_attention(candidates)
        first_of_window = candidates.position - limits.window
        position = torch.arange(
            first_of_window - num, candidates.position, device=received.device
        ).repeat(len(received), 1)
        after = torch.stack([received, position.float()], dim=1)
        if numbers is not None:
            after[:, 0, :num] += self.decay * numbers[:, 0]
            after[:, 1, :num] = numbers[:, 1]
        is_recent = after[:, 1, :num] >= candidates.position - self.num_recent(limits)
        return after[:, 0, :num].masked_fill(is_recent, torch.inf), after


def received_attention(candidates: Candidates) -> torch.Tensor:
    """Attention that the window's queries have paid to each token, summed.

    ``a[j] = sum over w, g of softmax_j(q_wg . k_j * scale)`` over all tokens that the sequence held
    then, candidates and those of the window up to the query's own.

    Returns:
        [H, n + W] fp32: of the candidates in slot order, and of the window.
    """
    window, device = candidates.limits.window, candidates.queries.device
    keys = torch.cat([candidates.keys, candidates.window_keys], dim=-1)
    # The query at position p is ring entry p mod W: rolled, they come in order of position.
    queries = candidates.queries.unflatten(1, (window, -1)).roll(-candidates.position % window, 1)
    age = torch.arange(window, device=device)
    is_later = torch.zeros(window, 1, keys.shape[-1], dtype=torch.bool, device=device)
    is_later[:, 0, -window:] = age[None, :] > age[:, None]
    received = queries.new_empty(len(keys), keys.shape[-1])
    for head, (of_head, to) in enumerate(zip(queries, keys, strict=True)):
        logits = (of_head @ to * candidates.scale).masked_fill_(is_later, -torch.inf)
        received[head] = logits.softmax(dim=-1).sum(dim=(0, 1))
    return received
