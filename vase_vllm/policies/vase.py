"""VaSE, and the ablations of its paper (arXiv 2606.03928)."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch

from vase_vllm.kernels.parameters import EvictionLimits, EvictionParameters, Sampling
from vase_vllm.kernels.torch_eviction import value_range, vase_priority
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.protecting import ProtectingPolicy

MAGNITUDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "range": value_range,
    "variance": lambda values: values.float().var(dim=-1),
    "l2": lambda values: values.float().norm(dim=-1),
}
"""What makes a value abnormal: [..., D] -> [...], fp32."""


class VasePolicy(ProtectingPolicy):
    """Value-aware Stochastic KV Cache Eviction (arXiv 2606.03928).

    The sinks and the tokens whose values have the largest magnitudes are protected; the rest are
    drawn without replacement in proportion to the attention that the window pays them.
    """

    name: ClassVar[str] = "vase"

    sampling: Sampling = "gumbel"
    """``gumbel`` draws in proportion to attention, ``greedy`` keeps the top-k."""
    magnitude: Literal["range", "variance", "l2", "none"] = "range"
    """What is large about a value: ``range`` is max - min over its elements, ``l2`` its norm."""
    protect: Literal["large", "random", "none"] = "large"
    """Which tokens are protected: ``random`` and ``none`` are ablations."""
    evict_large: bool = False
    """Ablation: keeps the tokens of the smallest magnitude, whatever their attention."""

    def num_protected(self, limits: EvictionLimits) -> int:
        """``protected`` as a count of tokens; the fixed ones alone where no other is protected.

        >>> VasePolicy(protected=0.25).num_protected(EvictionLimits(budget=4096, window=64))
        1024
        """
        if self.protect == "none" or self.magnitude == "none":
            return limits.fixed
        return super().num_protected(limits)

    def check(self, limits: EvictionLimits) -> None:
        """See :meth:`Policy.check`."""
        super().check(limits)
        if self.evict_large and self.magnitude == "none":
            raise ValueError(
                "evict_large needs a magnitude: set magnitude to range, variance or l2"
            )
        if self.protect == "random" and self.magnitude == "none":
            raise ValueError(
                "magnitude none protects nothing, and protect is random: "
                "remove magnitude or set protect none"
            )

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """See :meth:`Policy.priority`."""
        if self.evict_large:
            return -candidates.of_values(MAGNITUDES[self.magnitude])
        limits = candidates.limits
        noise = candidates.draws.gumbel() if self.sampling == "gumbel" else None
        return vase_priority(
            self.attention(candidates),
            self._magnitudes(candidates),
            noise,
            limits.fixed,
            self.num_protected(limits),
        )

    def _magnitudes(self, candidates: Candidates) -> torch.Tensor:
        """What protects a candidate, the largest first: [H, n] fp32."""
        if self.num_protected(candidates.limits) == candidates.limits.fixed:
            return candidates.queries.new_zeros(len(candidates.queries), candidates.num)
        if self.protect == "random":
            return candidates.draws.uniform()
        return candidates.of_values(MAGNITUDES[self.magnitude])

    def fused(self, limits: EvictionLimits) -> EvictionParameters | None:
        """See :meth:`Policy.fused`."""
        num_protected = self.num_protected(limits)
        by_range = self.protect == "large" and self.magnitude == "range"
        if self.evict_large or not (by_range or num_protected == limits.fixed):
            return None
        return EvictionParameters.of(
            limits,
            protected=num_protected,
            smoothing=self.smoothing,
            temperature=self.temperature,
            sampling=self.sampling,
        )
