"""The parameters of one eviction, as absolute counts, checked."""

from dataclasses import dataclass
from typing import Any, Literal

Sampling = Literal["gumbel", "greedy"]
Scoring = Literal["attention", "uniform", "age"]
ProtectBy = Literal["value_range", "distinctness"]


@dataclass(frozen=True)
class EvictionLimits:
    """What every policy is told of an eviction.

    Attributes:
        budget: tokens that a sequence holds right after an eviction, the window and the tokens of
            its prompt that are kept included.
        window: newest tokens; never evicted. Also the period of the evictions.
        sinks: first tokens of the sequence; never evicted.
        seed: 64-bit seed of the counter-based generator.
        kept: first tokens of the prompt that are kept beside what the user calls the budget.
    """

    budget: int
    window: int
    sinks: int = 4
    seed: int = 0
    kept: int = 0

    @property
    def fixed(self) -> int:
        """First slots of the sequence whose tokens always stay: its sinks, its kept prompt."""
        return max(self.sinks, self.kept)

    def tokens(self, share: int | float) -> int:
        """A fraction of the budget, without a prompt that is kept beside it, as a count of tokens.

        >>> limits = EvictionLimits(budget=4096 + 300, window=64, kept=300)
        >>> limits.tokens(0.25), limits.tokens(100)
        (1024, 100)

        Args:
            share: a float is a fraction; an int is a count already.
        """
        return int(share * (self.budget - self.kept)) if isinstance(share, float) else share


@dataclass(frozen=True)
class EvictionParameters:
    """Parameters of an eviction as the fused kernel takes them; all lengths are counts of tokens.

    Attributes:
        budget: tokens that a sequence holds right after an eviction, the window included.
        window: newest tokens; never evicted, their queries score the rest. Also the period.
        protected: candidates kept for the largest number that ``protect_by`` names; the sinks
            count among them.
        sinks: first slots of the sequence, a kept prompt among them; always protected.
        smoothing: odd width of the average pooling over slots; 1 is off.
        temperature: divides the attention logits before the softmax.
        sampling: ``gumbel`` draws at random, ``greedy`` keeps the largest scores.
        seed: 64-bit seed of the counter-based generator.
        scoring: what ranks the candidates that are not protected. ``attention``: the attention that
            the window's queries pay them. ``uniform``: all have score 1, so that the draw is
            uniform. ``age``: a number that the caller gives for each slot, such as the position of
            its token; the largest survive. The last two protect the sinks alone.
        protect_by: ``value_range``: the range of the value over its elements. ``distinctness``: how
            unlike the window's values the value is (``torch_distinctness.py``); with scoring
            ``attention`` alone.
        ridge: of the distinctness, above 0: how much a value counts in directions that the window's
            values do not have.
        memory: what is left at an eviction of the attention received before, from 0 to 1. Above 0
            two numbers go along with each token (``remembering.py``); with ``protect_by``
            ``distinctness`` and smoothing 1 alone.
        strata: parts of equally many tokens, by position, into which what is not protected is
            divided; each keeps as many as the others (``strata.py``). At most ``window``. Above 1 a
            number goes along with each token; with ``protect_by`` ``distinctness`` alone.

    Raises:
        ValueError: names the parameter that is out of its range or does not go with another.
    """

    budget: int
    window: int
    protected: int
    sinks: int = 4
    smoothing: int = 5
    temperature: float = 1.0
    sampling: Sampling = "gumbel"
    seed: int = 0
    scoring: Scoring = "attention"
    protect_by: ProtectBy = "value_range"
    ridge: float = 0.1
    memory: float = 0.0
    strata: int = 1

    @classmethod
    def of(
        cls, limits: EvictionLimits, protected: int | None = None, **rule: Any
    ) -> "EvictionParameters":
        """The parameters of a policy's rule within limits.

        >>> limits = EvictionLimits(budget=4096, window=64, sinks=4)
        >>> EvictionParameters.of(limits, sampling="greedy").protected
        4

        Args:
            limits: of the eviction.
            protected: candidates to protect; None protects those that are fixed alone.
            rule: any of the other attributes.
        """
        return cls(
            budget=limits.budget,
            window=limits.window,
            sinks=limits.fixed,
            seed=limits.seed,
            protected=limits.fixed if protected is None else protected,
            **rule,
        )

    @property
    def counts(self) -> tuple[int, int, int]:
        """What may differ between the sequences of a launch: budget, sinks and protected."""
        return self.budget, self.sinks, self.protected

    @property
    def num_numbers(self) -> int:
        """How many numbers go along with each token: the two of ``memory``, then the position."""
        return 2 * (self.memory > 0) + (self.strata > 1)

    def __post_init__(self) -> None:
        if not 0 < self.window < self.budget:
            raise ValueError(f"window must be in [1, budget), got {self.window}")
        if not self.sinks <= self.protected <= self.budget - self.window:
            raise ValueError(f"protected must be in [sinks, budget - window], got {self.protected}")
        if self.smoothing < 1 or self.smoothing % 2 == 0:
            raise ValueError(f"smoothing must be odd and positive, got {self.smoothing}")
        if self.ridge <= 0:
            raise ValueError(f"ridge must be above 0, got {self.ridge}")
        if not 0 <= self.memory <= 1:
            raise ValueError(f"memory must be in [0, 1], got {self.memory}")
        if self.memory and self.protect_by != "distinctness":
            raise ValueError(
                f"memory must be 0 with protect_by {self.protect_by!r}, got {self.memory}"
            )
        if self.memory and self.smoothing > 1:
            raise ValueError(f"memory must be 0 with smoothing {self.smoothing}, got {self.memory}")
        if not 1 <= self.strata <= self.window:
            raise ValueError(f"strata must be in [1, window], got {self.strata}")
        if self.strata > 1 and self.protect_by != "distinctness":
            raise ValueError(
                f"strata must be 1 with protect_by {self.protect_by!r}, got {self.strata}"
            )
        if self.scoring == "attention":
            return
        if self.protect_by != "value_range":
            raise ValueError(
                f"protect_by must be 'value_range' with scoring {self.scoring!r}, "
                f"got {self.protect_by!r}"
            )
        if self.protected != self.sinks:
            raise ValueError(
                f"protected must equal sinks ({self.sinks}) with scoring {self.scoring!r}, "
                f"got {self.protected}"
            )
        sampling = "gumbel" if self.scoring == "uniform" else "greedy"
        if self.sampling != sampling:
            raise ValueError(
                f"sampling must be {sampling!r} with scoring {self.scoring!r}, "
                f"got {self.sampling!r}"
            )
