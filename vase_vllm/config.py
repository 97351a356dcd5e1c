"""The settings of KV cache eviction: parsed, checked and documented here and nowhere else."""

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vase_vllm.kernels.parameters import EvictionParameters, Sampling

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ADDITIONAL_CONFIG_KEY = "kv_eviction"
POLICIES = ("none", "vase")


class EvictionConfig(BaseModel):
    """Settings of ``--kv-eviction-config``.

    A sequence holds ``budget`` tokens per layer and KV head right after an eviction and at most
    ``budget + window`` before the next one. Defaults are those of the paper (arXiv 2606.03928).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    policy: Literal["vase"] = "vase"
    """Eviction method."""
    budget: int = Field(default=4096, gt=0)
    """Tokens that a sequence keeps at an eviction, the window included."""
    window: int = Field(default=64, gt=0)
    """Newest tokens: never evicted, and their queries score the rest. Also the eviction period."""
    protected: int | float = Field(default=0.25, ge=0)
    """Tokens kept for their abnormally large value range: a fraction of the budget, or a count."""
    sinks: int = Field(default=4, ge=0)
    """First tokens of the sequence, always protected."""
    smoothing: int = Field(default=5, ge=1)
    """Width of the average pooling of the scores over slots; 1 is off."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the attention logits before the softmax."""
    sampling: Sampling = "gumbel"
    """``gumbel`` draws in proportion to attention, ``greedy`` keeps the top-k."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the draws."""

    @model_validator(mode="after")
    def _check(self) -> "EvictionConfig":
        if self.budget <= self.window:
            raise ValueError(
                f"budget ({self.budget}) must be larger than window ({self.window}): "
                "raise budget or lower window"
            )
        if isinstance(self.protected, float) and self.protected > 1:
            raise ValueError(
                f"protected ({self.protected}) must be a fraction up to 1 or an integer count"
            )
        if self.num_protected > self.budget - self.window:
            raise ValueError(
                f"protected ({self.num_protected} tokens) must be at most budget - window "
                f"({self.budget - self.window}): lower protected or raise budget"
            )
        if self.num_protected < self.sinks:
            raise ValueError(
                f"protected ({self.num_protected} tokens) must be at least sinks "
                f"({self.sinks}), which count among them: raise protected or lower sinks"
            )
        if self.smoothing % 2 == 0:
            raise ValueError(f"smoothing ({self.smoothing}) must be odd: use 1 to switch it off")
        return self

    @cached_property
    def num_protected(self) -> int:
        """``protected`` as a count of tokens."""
        if isinstance(self.protected, int):
            return self.protected
        return int(self.protected * self.budget)

    @cached_property
    def parameters(self) -> EvictionParameters:
        """The same settings as the kernels take them."""
        return EvictionParameters(
            budget=self.budget,
            window=self.window,
            protected=self.num_protected,
            sinks=self.sinks,
            smoothing=self.smoothing,
            temperature=self.temperature,
            sampling=self.sampling,
            seed=self.seed,
        )

    @classmethod
    def parse(cls, settings: dict[str, Any]) -> "EvictionConfig":
        """Check settings.

        Raises:
            ValueError: one line that names the setting and the remedy.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise ValueError("; ".join(map(_one_line, error.errors()))) from None

    @classmethod
    def from_vllm(cls, vllm_config: "VllmConfig") -> "EvictionConfig | None":
        """The eviction settings of an engine, or None where eviction is off."""
        return cls.from_additional(vllm_config.additional_config)

    @classmethod
    def from_additional(cls, additional: Any) -> "EvictionConfig | None":
        """The same from vLLM's ``additional_config``, before there is an engine's config."""
        settings = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None
        if not settings or settings.get("policy", "vase") == "none":
            return None
        return cls.parse(settings)


def _one_line(error: Any) -> str:
    """One pydantic error as "--kv-eviction-config.key: what is wrong"."""
    key = ".".join(str(part) for part in error["loc"] if part not in ("int", "float"))
    setting = f"--kv-eviction-config.{key}" if key else "--kv-eviction-config"
    if error["type"] == "extra_forbidden":
        known = ", ".join(name for name in EvictionConfig.model_fields if name != "policy")
        return f"{setting}: unknown key; the keys are {known}"
    message = error["msg"].removeprefix("Value error, ")
    if key and error["type"] != "value_error":
        message += f", got {error['input']!r}"
    return f"{setting}: {message}"
