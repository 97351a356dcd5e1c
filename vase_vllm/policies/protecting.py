"""What policies share that protect a part of the budget, and keep the rest by attention."""

from pydantic import Field

from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.policies.base import AttentionPolicy


class ProtectingPolicy(AttentionPolicy):
    """A policy that keeps some tokens for their values, whatever attention the window pays them."""

    protected: int | float = Field(default=0.25, ge=0)
    """Tokens kept for their abnormally large values: a fraction of the budget, or a count. The
    sinks are among them."""

    def num_protected(self, limits: EvictionLimits) -> int:
        """``protected`` as a count of tokens.

        Beside a kept prompt as many are protected as beside the sinks of one that is not kept:

        >>> from vase_vllm.policies.vase import VasePolicy
        >>> limits = EvictionLimits(budget=4096 + 300, window=64, sinks=4, kept=300)
        >>> VasePolicy(protected=0.25).num_protected(limits)
        1320
        """
        return limits.fixed + limits.tokens(self.protected) - limits.sinks

    def check(self, limits: EvictionLimits) -> None:
        """See :meth:`Policy.check`."""
        super().check(limits)
        if isinstance(self.protected, float) and self.protected > 1:
            raise ValueError(
                f"protected ({self.protected}) must be a fraction up to 1 or an integer count"
            )
        if (num_protected := self.num_protected(limits)) > limits.budget - limits.window:
            raise ValueError(
                f"protected ({num_protected} tokens) must be at most budget - window "
                f"({limits.budget - limits.window}): lower protected or raise budget"
            )
        if num_protected < limits.sinks:
            raise ValueError(
                f"protected ({num_protected} tokens) must be at least sinks "
                f"({limits.sinks}), which count among them: raise protected or lower sinks"
            )
