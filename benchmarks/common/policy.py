"""One way to serve: the full cache, or an eviction policy with its settings."""

from dataclasses import dataclass

from vase_vllm.config import EvictionConfig
from vase_vllm.layout.schedule import EvictionSchedule


@dataclass(frozen=True)
class Policy:
    """One way to serve.

    Attributes:
        name: as the tables and plots call it.
        budget: tokens that a sequence keeps at an eviction; None is the full cache.
        eviction: name of the eviction policy.
        settings: of ``--kv-eviction-config``, beside the budget.
        arguments: further ones of ``vllm serve``.
    """

    name: str
    budget: int | None = None
    eviction: str = "vase"
    settings: tuple[tuple[str, str], ...] = ()
    arguments: tuple[str, ...] = ()

    @property
    def window(self) -> int:
        """Tokens between evictions; the default where the settings do not name it."""
        default = EvictionConfig.model_fields["window"].default
        return int(dict(self.settings).get("window", default))

    @property
    def schedule(self) -> EvictionSchedule | None:
        """When a sequence evicts; None for the full cache."""
        if self.budget is None:
            return None
        keeps_prompt = dict(self.settings).get("prompt") == "keep"
        return EvictionSchedule(self.budget, self.window, keeps_prompt=keeps_prompt)

    def serve_arguments(self) -> list[str]:
        """What distinguishes this policy's server; everything else is vLLM's default."""
        if self.budget is None:
            return list(self.arguments)
        arguments = ["--kv-eviction", self.eviction]
        for key, value in (("budget", str(self.budget)), *self.settings):
            arguments += [f"--kv-eviction-config.{key}", value]
        return [*arguments, *self.arguments]
