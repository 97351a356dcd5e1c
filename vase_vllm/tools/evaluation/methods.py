"""What is compared: the full cache, and policies with their settings at a budget."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.tools.policy_label import parse_policy_label

FULL = "full"


@dataclass(frozen=True)
class Method:
    """One way to hold the cache.

    Attributes:
        label: ``full``, or the policy with its settings as the user wrote them.
        budget: tokens that a sequence keeps at an eviction; None is the full cache.
        eviction: settings of eviction in vLLM's ``additional_config``; None is the full cache.
    """

    label: str
    budget: int | None = None
    eviction: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def name(self) -> str:
        """The label and the budget."""
        return self.label if self.budget is None else f"{self.label}, budget {self.budget}"

    @property
    def directory_name(self) -> str:
        """The name as a directory's."""
        safe = re.sub(r"[^\w.=-]+", "-", self.label)
        return safe if self.budget is None else f"{safe}-{self.budget}"

    @cached_property
    def config(self) -> EvictionConfig | None:
        """The settings, parsed; None is the full cache."""
        return None if self.eviction is None else EvictionConfig.parse(self.eviction)

    @property
    def first_scored(self) -> int:
        """The first position that is computed with a cache that tokens were evicted from."""
        return 0 if self.config is None else self.config.schedule.bound


def choose_methods(labels: Sequence[str], budgets: Sequence[int], window: int) -> list[Method]:
    """The full cache, then each policy at each budget.

    Args:
        labels: NAME or NAME:KEY=VALUE,... of each policy; ``full`` may be among them.
        window: tokens between evictions, of every policy.

    Raises:
        EvictionError: one line that names what is wrong.
    """
    methods = [Method(FULL)]
    for budget in dict.fromkeys(budgets):
        for label in dict.fromkeys(labels):
            if label == FULL:
                continue
            policy, settings = parse_policy_label(label)
            common = {"policy": policy, "budget": budget, "window": window, "prefill": "bounded"}
            if twice := sorted(common.keys() & settings):
                raise EvictionError(
                    f"--policies {label}: remove {twice[0]}, which all policies share here "
                    "(--budgets and --window; the prefill is bounded)"
                )
            own = {key: _typed(value) for key, value in settings.items()}
            eviction = {**common, **own}
            try:
                EvictionConfig.parse(eviction)
            except EvictionError as error:
                raise EvictionError(f"--policies {label} --budgets {budget}: {error}") from None
            methods.append(Method(label, budget, eviction))
    if len(methods) == 1:
        raise EvictionError("--policies: name a policy besides full, and a budget with --budgets")
    return methods


def _typed(value: str) -> Any:
    """A setting's value as ``vllm serve`` would read it: JSON where it is, else the text itself."""
    try:
        return json.loads(value)
    except ValueError:
        return value
