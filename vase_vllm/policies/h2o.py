"""H2O's ranking (arXiv 2306.14048): the attention that a token has received so far."""

from typing import ClassVar

import torch
from pydantic import Field

from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.policies.base import Policy
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.positions import token_positions
from vase_vllm.policies.received import received_attention


class H2OPolicy(Policy):
    """Keeps the newest tokens and the heavy hitters (H2O, arXiv 2306.14048).

    A heavy hitter is a token that has received much attention, summed over all queries since it
    came. Every query of an output counts; of a prompt's queries those of its last window do, which
    are the ones that are kept. In grouped-query attention the query heads of a KV head add up.
    """

    name: ClassVar[str] = "h2o"

    recent: int | float = Field(default=0.5, ge=0)
    """Newest tokens that are kept whatever attention they receive, the window included: a fraction
    of the budget, or a count. The authors keep as many as heavy hitters."""
    decay: float = Field(default=1.0, ge=0, le=1)
    """What is left at an eviction of the attention received before the last one; 1 forgets nothing,
    which is H2O, and 0 everything."""

    @property
    def num_numbers(self) -> int:
        """See :class:`Policy`: the attention received, and the position."""
        return 2

    def check(self, limits: EvictionLimits) -> None:
        """See :meth:`Policy.check`."""
        if isinstance(self.recent, float) and self.recent > 1:
            raise ValueError(f"recent ({self.recent}) must be a fraction up to 1 or a count")
        num_recent = max(limits.tokens(self.recent), limits.window)
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
        positions = token_positions(candidates, None if numbers is None else numbers[:, 1])
        after = torch.stack([received_attention(candidates), positions], dim=1)
        if numbers is not None:
            after[:, 0, :num] += self.decay * numbers[:, 0]
        is_recent = after[:, 1, :num] >= candidates.position - limits.tokens(self.recent)
        return after[:, 0, :num].masked_fill(is_recent, torch.inf), after
