"""What is compared: a method more is one more entry in a table here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.accuracy.tasks import Problem
from benchmarks.common.policy import Policy

WINDOW = 16
"""Small beside the smallest budget, so that a method decides about most of it."""
COMPRESSIONS = (2, 4, 8)
PROMPT = 85
"""Tokens of a prompt, ``<bos>`` included; all have the same length."""
STATISTICS = Path(__file__).with_name("query_statistics.safetensors")
"""What ``vase-vllm calibrate`` found of the testbed's model on other problems; see README.md."""


@dataclass(frozen=True)
class Method:
    """What is compared, at any budget and with any seed.

    Attributes:
        name: as the tables and plots call it.
        policy: of ``--kv-eviction``; None is the full cache.
        settings: of ``--kv-eviction-config``, beside budget, window and seed.
        draws: whether it draws random numbers, so that several seeds say more than one.
        beside: the method of whose settings it has others, and beside which it is shown.
    """

    name: str
    policy: str | None
    settings: dict[str, str] = field(default_factory=dict)
    draws: bool = False
    beside: str | None = None

    @property
    def keeps_prompt(self) -> bool:
        """Whether a prompt's tokens are never evicted."""
        return self.settings.get("prompt") == "keep"

    @property
    def _prompt(self) -> int:
        """Tokens of the budget that a kept prompt takes."""
        return PROMPT if self.keeps_prompt else 0

    def fits(self, budget: int) -> bool:
        """Whether a budget leaves two windows at least beside a kept prompt."""
        return budget - self._prompt >= 2 * WINDOW

    def at(self, budget: int | None, seed: int) -> Policy:
        """The method with a budget and a seed, as it is served.

        Where prompts are kept beside the budget, it is less by a prompt: all methods hold as much.
        """
        if self.policy is None or budget is None:
            return Policy(self.name)
        budget -= self._prompt
        settings = {"window": str(WINDOW), "seed": str(seed), **self.settings}
        return Policy(self.name, budget, self.policy, tuple(settings.items()))


def _ablation(name: str, draws: bool, **settings: str) -> Method:
    return Method(f"vase-{name}", "vase", settings, draws, beside="vase")


def _prompt_kept(*methods: Method) -> tuple[Method, ...]:
    return tuple(
        replace(
            method, name=f"{method.name}-prompt-kept", settings=method.settings | {"prompt": "keep"}
        )
        for method in methods
    )


POLICIES = (
    Method("vase", "vase", draws=True),
    Method("snapkv", "snapkv"),
    Method("rkv", "rkv"),
    Method("cur-redrawn", "cur", {"gaussian": "redrawn"}, draws=True),
    Method("expected", "expected"),
    Method("triattention", "triattention", {"statistics": os.path.relpath(STATISTICS)}),
    Method("h2o", "h2o"),
    Method("streaming", "streaming"),
    Method("random", "random", draws=True),
    Method("distinct", "distinct"),
)
DISTINCT = tuple(
    Method(f"distinct-{name}", "distinct", settings, beside="distinct")
    for name, settings in {
        "remembering": {"memory": "0.9"},
        "strata": {"strata": "4"},
        "remembering-strata": {"memory": "0.9", "strata": "4"},
        "less": {"protected": "0.375"},
        "less-remembering": {"protected": "0.375", "memory": "0.9"},
        "less-strata": {"protected": "0.375", "strata": "4"},
        "more": {"protected": "0.75"},
    }.items()
)
METHODS = (
    Method("full", None),
    *POLICIES,
    Method("cur-fixed", "cur", {"gaussian": "fixed"}, draws=True),
    *_prompt_kept(*POLICIES),
    _ablation("no-protection", draws=True, protect="none"),
    _ablation("no-randomness", draws=False, sampling="greedy"),
    # As in the paper: tokens drawn at random in place of the large ones, beside the top-k.
    _ablation("random-protected", draws=True, protect="random", sampling="greedy"),
    _ablation("variance", draws=True, magnitude="variance"),
    _ablation("l2", draws=True, magnitude="l2"),
    _ablation("evict-large", draws=False, evict_large="true"),
    *DISTINCT,
    *_prompt_kept(*DISTINCT),
)


def mean_length(problems: list[Problem]) -> float:
    """Tokens of a sequence that is solved, ``<bos>`` and prompt included: a word is a token."""
    lengths = (1 + len(p.prompt.split()) + len(p.completion.split()) for p in problems)
    return sum(lengths) / len(problems)


def budget_for(compression: int, length: float) -> int:
    """The budget that is ``compression`` times smaller than a whole sequence, in eights."""
    return int(length / compression) // 8 * 8
