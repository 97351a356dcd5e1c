"""What is compared, and under which setting."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.policy import Policy
from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.tools.plan.cost import Shard
from vase_vllm.tools.plan.model_shape import read_model_shape

FEWEST_CHECKED = 8
"""Tokens of an output that have to be compared with those of the full cache."""


@dataclass(frozen=True)
class Setting:
    """One setting, the same for all systems. Lengths are in tokens.

    Attributes:
        model: directory of the model.
        prompt_len, output_len: of every request.
        budget: tokens for each layer and KV head right after an eviction.
        window: tokens between two evictions.
        requests: how many are sent at once, in this order.
        serial_requests: most that a system without batches has to run, one after another.
        texts: number of texts whose likelihood is measured; 0 leaves it out.
        threads: of every system.
        dtype: of weights and KV cache, as torch and vLLM name it.
        device: ``cpu`` or ``cuda``.
        serve_arguments: further ones of ``vllm serve``.
    """

    model: Path
    prompt_len: int
    output_len: int
    budget: int
    window: int
    requests: tuple[int, ...]
    serial_requests: int
    texts: int
    threads: int
    dtype: str
    device: str
    serve_arguments: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Of a whole sequence."""
        return self.prompt_len + self.output_len

    @property
    def bound(self) -> int:
        """Most tokens of a sequence that a system under eviction holds."""
        return self.budget + self.window

    @property
    def checked(self) -> int:
        """First tokens of an output, which no system computes with fewer tokens than there are.

        randkv is the first to evict, when a sequence outgrows the budget.
        """
        return self.budget - self.prompt_len

    def check(self) -> None:
        """Refuse a setting under which the systems could not be compared.

        Raises:
            EvictionError: one line that names the setting and the remedy.
        """
        if self.prompt_len > self.budget - self.window:
            raise EvictionError(
                f"--prompt-len {self.prompt_len}: randkv never evicts a prompt, which has to fit "
                f"into budget - window ({self.budget} - {self.window}); lower it or raise --budget"
            )
        if self.checked < FEWEST_CHECKED:
            raise EvictionError(
                f"--budget {self.budget}: the first {FEWEST_CHECKED} tokens of an output are "
                "compared with the full cache's before anything is evicted; raise it"
            )
        if self.length <= self.bound + self.window:
            raise EvictionError(
                f"--output-len {self.output_len}: a sequence evicts less than twice at budget + "
                f"window ({self.budget} + {self.window}); raise it to more than "
                f"{self.bound + self.window - self.prompt_len}"
            )
        EvictionConfig.parse(
            {"policy": "vase", "budget": self.budget, "window": self.window, "prefill": "bounded"}
        )
        if not (self.model / "config.json").is_file():
            raise EvictionError(
                f"--model {self.model}: there is no config.json; vase-vllm demo-model DIR makes a "
                "small real model"
            )
        longest = read_model_shape(str(self.model))[1]
        if self.length > longest:
            raise EvictionError(
                f"--output-len {self.output_len}: the model takes {longest} tokens, prompt "
                "included; lower it"
            )

    def shard(self) -> Shard:
        """Shape and element size of the model."""
        return Shard(read_model_shape(str(self.model), self.dtype)[0])


@dataclass(frozen=True)
class System:
    """One of those that are compared.

    Attributes:
        name: as the tables call it.
        cache: what holds the KV cache, a key of ``CACHES``; None is vLLM.
        eviction: policy of vLLM's server; None is the full cache.
        environment: where the library is installed; None is the environment of this command.
        evicts: whether its cache is bounded.
        batches: whether it computes requests together.
    """

    name: str
    cache: str | None = None
    eviction: str | None = None
    environment: str | None = None
    evicts: bool = True
    batches: bool = True

    def policy(self, setting: Setting) -> Policy:
        """How vLLM serves it."""
        if self.eviction is None:
            return Policy(self.name)
        # The likelihood is that of a prompt, which is evicted from as an output is. In the other
        # requests prompts are below the budget, so that it makes no difference.
        settings = (("window", str(setting.window)), ("prefill", "bounded"))
        return Policy(self.name, setting.budget, self.eviction, settings)

    def num_run(self, requests: int, setting: Setting) -> int:
        """How many of the requests it has to run."""
        return requests if self.batches else min(requests, setting.serial_requests)


REFERENCE = System("transformers, full cache", cache="transformers", evicts=False)
SYSTEMS = (
    REFERENCE,
    System("vLLM, full cache", evicts=False),
    System("vLLM, vase", eviction="vase"),
    System("vLLM, random", eviction="random"),
    System("kvpress, SnapKV", cache="kvpress-snapkv", environment="kvpress"),
    System("kvpress, random", cache="kvpress-random", environment="kvpress"),
    System("randkv", cache="randkv", environment="randkv", batches=False),
)


def choose(names: Sequence[str] | None) -> list[System]:
    """Systems by name; the reference is always among them.

    Raises:
        EvictionError: there is no such system.
    """
    known = {system.name: system for system in SYSTEMS}
    for name in names or ():
        if name not in known:
            raise EvictionError(f"--systems {name!r}: choose from {', '.join(map(repr, known))}")
    return [s for s in SYSTEMS if names is None or s.name in names or s is REFERENCE]
