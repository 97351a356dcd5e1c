"""How scores make a rule: parts of the budget go to the largest of one after the other, the rest to
the last.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.accuracy.scores import Score, attention
from benchmarks.accuracy.teacher_forcing import Rule, TextCandidates
from vase_vllm.kernels.torch_eviction import largest
from vase_vllm.policies.received import mean_received_attention

Part = float | Callable[[float], float]
"""Of the budget, or by the depth of the layer."""


def parts(
    protected: Sequence[tuple[Score, Part]], then: Score = attention, draw: bool = False
) -> Rule:
    """A rule.

    Args:
        protected: scores, and the parts of the budget that the largest of what is left get.
        then: score of the rest.
        draw: draw the rest in proportion to it.
    """

    def rule(c: TextCandidates, _numbers: Tensor | None) -> tuple[Tensor, None]:
        rest = then(c)
        if draw:
            rest = rest.log() + c.draws.gumbel()
        return rest.masked_fill(taken_by(protected, c), torch.inf), None

    return rule


def taken_by(protected: Sequence[tuple[Score, Part]], c: TextCandidates) -> Tensor:
    """The candidates that get the parts of the budget, and the sinks: [H, n] bool."""
    taken = torch.zeros(len(c.queries), c.num, dtype=torch.bool)
    taken[:, : c.limits.sinks] = True
    for score, part in protected:
        left = score(c).masked_fill(taken, -torch.inf)
        of_budget = part(c.depth) if callable(part) else part
        taken |= largest(left, int(of_budget * c.limits.budget))
    return taken


def remembering(
    protected: Sequence[tuple[Score, Part]], decay: float = 1.0, per_query: bool = False
) -> Rule:
    """As :func:`parts`, and the rest by the attention received since each token came.

    Args:
        decay: what is left of it at each eviction.
        per_query: divide it by the number of queries that can have paid it, likewise decayed.
    """

    def rule(c: TextCandidates, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
        after = mean_received_attention(c, numbers, decay)
        rest = after[:, 0] / after[:, 1] if per_query else after[:, 0]
        return rest[:, : c.num].masked_fill(taken_by(protected, c), torch.inf), after

    return rule


def averaging(protected: Sequence[tuple[Score, Part]], decay: float) -> Rule:
    """As :func:`parts`, and the rest by the mean attention at the evictions of each token so far.

    Unlike :func:`remembering` it goes by attention to candidates alone: no query sees the window,
    and a token that leaves the window has received nothing.
    """

    def rule(c: TextCandidates, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
        now = c.attention()
        after = torch.stack([now, torch.ones_like(now)], dim=1)
        if numbers is not None:
            after += decay * numbers
        rest = (after[:, 0] / after[:, 1]).masked_fill(taken_by(protected, c), torch.inf)
        return rest, pad(after, (0, c.limits.window))

    return rule


def largest_so_far(protected: Sequence[tuple[Score, Part]], decay: float) -> Rule:
    """As :func:`parts`, and the rest by the largest attention at an eviction of each token so far.

    Args:
        decay: what is left of it at each eviction.
    """

    def rule(c: TextCandidates, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
        most = c.attention()
        if numbers is not None:
            most = torch.maximum(most, decay * numbers[:, 0])
        rest = most.masked_fill(taken_by(protected, c), torch.inf)
        return rest, pad(most[:, None], (0, c.limits.window))

    return rule
