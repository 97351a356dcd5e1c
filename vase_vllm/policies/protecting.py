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

        Beside a kept prompt as many are protected as beside the sinks of one that is not kept.
        """
        return limits.fixed + token_count(self.protected, limits) - limits.sinks

    def check(self, limits: EvictionLimits) -> None:
        """See :meth:`Policy.check`."""
        super().check(limits)
        check_fraction("protected", self.protected)
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


def token_count(share: int | float, limits: EvictionLimits) -> int:
    """A setting that is a fraction of the budget or a count, as a count.

    >>> token_count(0.25, EvictionLimits(budget=4096, window=64))
    1024
    >>> token_count(0.25, EvictionLimits(budget=4096 + 300, window=64, kept=300))
    1024
    """
    return share if isinstance(share, int) else int(share * (limits.budget - limits.kept))


def check_fraction(key: str, share: int | float) -> None:
    """Check that a fraction is not above 1.

    Raises:
        ValueError: names the key.
    """
    if isinstance(share, float) and share > 1:
        raise ValueError(f"{key} ({share}) must be a fraction up to 1 or an integer count")
