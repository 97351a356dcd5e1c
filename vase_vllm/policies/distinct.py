"""Keeps the tokens whose keys and values the text around them does not have."""

from typing import ClassVar

import torch
from pydantic import Field

from vase_vllm.kernels.parameters import EvictionLimits, EvictionParameters
from vase_vllm.kernels.torch_distinctness import similarity_to, value_distinctness
from vase_vllm.kernels.torch_eviction import vase_priority
from vase_vllm.kernels.torch_strata import by_strata
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.positions import token_positions
from vase_vllm.policies.protecting import ProtectingPolicy
from vase_vllm.policies.received import mean_received_attention


class DistinctPolicy(ProtectingPolicy):
    """Keeps the tokens that are least like the text around them, then the most attended ones.

    What resembles the rest of a text can be lost without much harm; a fact that is stated once
    cannot. ``protected`` tokens are kept for the product of three numbers: 1 less the mean cosine
    similarity of the key to the window's keys, the value range (VaSE's), and the whitened length of
    the value beside the window's values. The rest are kept for the attention that the window pays
    them, or, with ``strata``, that it pays them in their part of the text. Nothing is drawn.

    Keys and values are compared with the window's because the window is a fair sample of the text.
    The candidates are not: they have survived for being distinct.

    Operations for n candidates of one KV head of size D, multiplications and additions counted
    apart: 2 W n D + 2 W^2 D for the whitening, beside the 2 G W n D of the attention.
    """

    name: ClassVar[str] = "distinct"

    protected: int | float = Field(default=0.5, ge=0)
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

    strata: int = Field(default=1, ge=1)
    """Parts of equally many tokens, by position, into which what is not protected is divided: each
    keeps as many of its most attended tokens as the others. The window pays old tokens little
    attention; with 1 they compete with new ones."""

    @property
    def num_numbers(self) -> int:
        """See :class:`Policy`: the attention received and the queries that it is of, if there is a
        memory; the position, if there are strata."""
        return 2 * bool(self.memory) + (self.strata > 1)

    def check(self, limits: EvictionLimits) -> None:
        """See :meth:`Policy.check`."""
        super().check(limits)
        if self.strata > limits.window:
            raise ValueError(
                f"strata ({self.strata}) must be at most window ({limits.window}): lower strata or "
                "raise window"
            )
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
        after = []
        if self.memory:
            before = None if numbers is None else numbers[:, :2]
            received = mean_received_attention(candidates, before, self.memory, self.temperature)
            attention = received[:, 0, : candidates.num] / received[:, 1, : candidates.num]
            after.append(received)
        else:
            attention = self.attention(candidates)
        priority = self._priority(candidates, attention)
        if self.strata > 1:
            positions = token_positions(candidates, None if numbers is None else numbers[:, -1])
            priority = by_strata(priority, positions[:, : candidates.num], self.strata)
            after.append(positions[:, None])
        return priority, torch.cat(after, dim=1) if after else None

    def _priority(self, candidates: Candidates, attention: torch.Tensor) -> torch.Tensor:
        """The protected tokens, then the largest ``attention``: [H, n]."""
        limits = candidates.limits
        of_values = value_distinctness(candidates.window_values, self.ridge)
        similarity = similarity_to(candidates.window_keys, candidates.keys)
        unlike = (1 - similarity) * candidates.of_values(of_values)
        return vase_priority(attention, unlike, None, limits.fixed, self.num_protected(limits))

    def fused(self, limits: EvictionLimits) -> EvictionParameters | None:
        """See :meth:`Policy.fused`."""
        return EvictionParameters.of(
            limits,
            protected=self.num_protected(limits),
            smoothing=self.smoothing,
            temperature=self.temperature,
            sampling="greedy",
            protect_by="distinctness",
            ridge=self.ridge,
            memory=self.memory,
            strata=self.strata,
        )
