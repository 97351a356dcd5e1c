"""The settings of KV cache eviction: parsed, checked and documented here and nowhere else."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from vase_vllm import ADDITIONAL_CONFIG_KEY
from vase_vllm.errors import EvictionError
from vase_vllm.kernels.parameters import EvictionLimits, EvictionParameters
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.layout.token_state import TokenStateLayout
from vase_vllm.policies.base import Policy
from vase_vllm.policies.registry import DEFAULT_POLICY, find_policy

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


Admission = Literal["expected", "reserve", "optimistic"]
Prefill = Literal["dense", "bounded"]
Prompt = Literal["evict", "keep"]


class EvictionConfig(BaseModel):
    """Settings of ``--kv-eviction-config`` that every policy has, and the policy with its own.

    A sequence holds ``budget`` tokens per layer and KV head right after an eviction and at most
    ``budget + window`` before the next one, beside its prompt if that is kept. Defaults are those
    of VaSE's paper (arXiv 2606.03928).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    policy: SerializeAsAny[Policy] = Field(default_factory=lambda: find_policy(DEFAULT_POLICY)())
    """Which tokens go."""
    budget: int = Field(default=4096, gt=0)
    """Tokens that a sequence keeps at an eviction, the window included."""
    window: int = Field(default=64, gt=0)
    """Newest tokens: never evicted, and their queries score the rest. Also the eviction period."""
    sinks: int = Field(default=4, ge=0)
    """First tokens of the sequence, never evicted."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the draws."""
    prefill: Prefill = "dense"
    """What a prompt holds while it is computed: ``dense``, all of its tokens until the first
    eviction, which follows the prompt; ``bounded``, never more than ``budget + window``: it is
    computed in chunks of ``window`` tokens with an eviction between two, like an output."""
    prompt: Prompt = "evict"
    """Whether a prompt's tokens are evicted like others: ``evict``, they are; ``keep``, never, and
    the budget is that of the output alone. A sequence then holds its prompt and ``budget +
    window`` tokens, and prompts that begin alike share their blocks."""
    admission: Admission = "expected"
    """When a request is admitted: ``expected``, when all running ones can probably grow beside it,
    judged by the lengths of the last outputs; ``reserve``, when they certainly can grow to their
    bound, so that none is preempted; ``optimistic``, as soon as its prompt fits, which is vLLM's
    own rule."""
    self_check: bool = True
    """Whether a start-up proves on a dummy sequence that evictions happen on this model, attention
    backend and model runner, and refuses to serve if they do not."""

    @model_validator(mode="after")
    def _check(self) -> "EvictionConfig":
        if self.budget <= self.window:
            raise ValueError(
                f"budget ({self.budget}) must be larger than window ({self.window}): "
                "raise budget or lower window"
            )
        if self.sinks > self.budget - self.window:
            raise ValueError(
                f"sinks ({self.sinks}) must be at most budget - window "
                f"({self.budget - self.window}): lower sinks or raise budget"
            )
        if self.prompt == "keep" and self.prefill == "bounded":
            raise ValueError(
                "prefill bounded evicts from the prompt, and prompt keep does not: "
                "set prefill dense or prompt evict"
            )
        self.policy.check(self.limits)
        return self

    def changed(self, **settings: Any) -> "EvictionConfig":
        """These settings with some of their own, checked together.

        Raises:
            pydantic.ValidationError: they do not go together.
        """
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate(own | settings)

    @cached_property
    def limits(self) -> EvictionLimits:
        """What an eviction of any policy is told, but for a prompt that is kept."""
        return EvictionLimits(self.budget, self.window, self.sinks, self.seed)

    def limits_of(self, budget: int, kept: int) -> EvictionLimits:
        """What an eviction of a sequence is told; ``budget`` and ``kept`` are in its row."""
        return replace(self.limits, budget=budget, kept=kept)

    @cached_property
    def schedule(self) -> EvictionSchedule:
        """When a sequence evicts and where its tokens lie."""
        return EvictionSchedule(
            self.budget, self.window, self.prefill == "bounded", self.prompt == "keep"
        )

    def token_state(
        self, block_size: int, head_size: int, dtype: "torch.dtype"
    ) -> TokenStateLayout:
        """Where the policy's numbers of each token lie; see :meth:`num_state_blocks`."""
        cell_bytes = 2 * head_size * dtype.itemsize
        return TokenStateLayout(self.policy.num_numbers, self.budget, block_size, cell_bytes)

    def num_state_blocks(
        self, group_size: int, block_size: int, head_size: int, dtype: "torch.dtype"
    ) -> int:
        """Blocks of a sequence beside those of its tokens.

        Args:
            group_size: query heads per KV head.
            block_size: token slots of a block.
            head_size: D of keys and values.
            dtype: of the cache.
        """
        ring = RingLayout(self.window, group_size, block_size)
        return ring.num_blocks + self.token_state(block_size, head_size, dtype).num_blocks

    @cached_property
    def fused(self) -> EvictionParameters | None:
        """The policy as the fused GPU kernel takes it, or None where it does not know it.

        Whether it does is the same for all sequences, whatever their budgets and prompts.
        """
        return self.policy.fused(self.limits)

    def __str__(self) -> str:
        settings = self.model_dump(exclude={"policy"}) | self.policy.model_dump(by_alias=True)
        return ", ".join(f"{key}={value}" for key, value in settings.items())

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> "EvictionConfig":
        """Check settings.

        Args:
            settings: ``policy``, the keys of that policy and those of all, in one.

        Raises:
            EvictionError: one line that names the setting and the remedy.
        """
        policy = find_policy(settings.get("policy", DEFAULT_POLICY))
        keys = settings_keys(policy)
        own = {key: value for key, value in settings.items() if key in keys}
        common = {key: value for key, value in settings.items() if key not in keys}
        try:
            return cls.model_validate(common | {"policy": policy.model_validate(own)})
        except ValidationError as error:
            known = [*(name for name in cls.model_fields if name != "policy"), *keys]
            lines = (_one_line(error, known) for error in error.errors())
            raise EvictionError("; ".join(lines)) from None

    @classmethod
    def from_vllm(cls, vllm_config: "VllmConfig") -> "EvictionConfig | None":
        """The eviction settings of an engine, or None where eviction is off."""
        return cls.from_additional(vllm_config.additional_config)

    @classmethod
    def from_additional(cls, additional: Any) -> "EvictionConfig | None":
        """The same from vLLM's ``additional_config``, before there is an engine's config.

        Settings are parsed once per process; later calls look them up.

        Raises:
            EvictionError: one line that names the setting and the remedy.
        """
        if not isinstance(additional, Mapping) or additional.get(ADDITIONAL_CONFIG_KEY) is None:
            return None
        settings = additional[ADDITIONAL_CONFIG_KEY]
        if not isinstance(settings, Mapping) or not settings:
            raise EvictionError(
                f"additional_config[{ADDITIONAL_CONFIG_KEY!r}] must be an object such as "
                f'{{"policy": "vase", "budget": 4096}}, got {settings!r}; remove it to switch '
                "eviction off"
            )
        if settings.get("policy") == "none":
            return None
        return _parse_once(json.dumps(settings, sort_keys=True, default=repr))


@cache
def _parse_once(settings: str) -> EvictionConfig:
    """:meth:`EvictionConfig.parse` of settings as JSON."""
    return EvictionConfig.parse(json.loads(settings))


def settings_keys(model: type[BaseModel]) -> list[str]:
    """The keys of a model's fields as a user writes them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _one_line(error: Any, known: list[str]) -> str:
    """One pydantic error as "--kv-eviction-config.key: what is wrong"."""
    key = ".".join(str(part) for part in error["loc"] if part not in ("int", "float"))
    setting = f"--kv-eviction-config.{key}" if key else "--kv-eviction-config"
    if error["type"] == "extra_forbidden":
        return f"{setting}: unknown key; the keys are {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if key and error["type"] != "value_error":
        message += f", got {error['input']!r}"
    return f"{setting}: {message}"
