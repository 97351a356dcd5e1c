"""A request's own settings of eviction: ``vllm_xargs``, or ``SamplingParams.extra_args``."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args

from pydantic import ValidationError

from vase_vllm.config import EvictionConfig, Prompt
from vase_vllm.errors import EvictionError

POLICY, BUDGET, PROMPT = "kv_eviction", "kv_eviction_budget", "kv_eviction_prompt"
REPORT = "kv_eviction_report"
KEYS = (POLICY, BUDGET, PROMPT, REPORT)
SAMPLE = "vase_vllm_sample"
"""Key that says which of a request's ``n`` samples this is, where neither it is the first nor its
seed says so. A patch of vLLM's front end adds it."""


def settings_of_request(
    config: EvictionConfig, extra_args: Mapping[str, Any] | None
) -> EvictionConfig | None:
    """The settings under which a request evicts, or None if it opts out of eviction.

    Args:
        config: of the server.
        extra_args: of the request's sampling parameters.

    Raises:
        EvictionError: one line that names the key, what it may be, and the remedy.
    """
    own = {key: value for key, value in (extra_args or {}).items() if "evict" in key.lower()}
    if not own:
        return config
    for key in own.keys() - set(KEYS):
        raise EvictionError(f"vllm_xargs.{key}: unknown key; the keys are {', '.join(KEYS)}")
    if (report := own.pop(REPORT, False)) not in (True, False):
        raise EvictionError(f"vllm_xargs.{REPORT}: must be true or false, got {report!r}")
    policy = own.pop(POLICY, config.policy.name)
    if policy not in ("none", config.policy.name):
        raise EvictionError(
            f"vllm_xargs.{POLICY}: must be none or {config.policy.name}, the policy of this "
            f"server, got {policy!r}"
        )
    if policy == "none":
        for key in own:
            raise EvictionError(
                f"vllm_xargs.{key}: has no effect with {POLICY} none; remove one of the two"
            )
        return None
    budget, prompt = own.get(BUDGET, config.budget), own.get(PROMPT, config.prompt)
    if type(budget) is not int or not config.window < budget <= config.budget:
        raise EvictionError(
            f"vllm_xargs.{BUDGET}: must be an integer above window ({config.window}) and up to the "
            f"server's budget ({config.budget}), got {budget!r}"
        )
    if prompt not in get_args(Prompt):
        raise EvictionError(
            f"vllm_xargs.{PROMPT}: must be {' or '.join(get_args(Prompt))}, got {prompt!r}"
        )
    return _merged(config, budget, prompt)


def wants_report(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request asks to be told what it has evicted."""
    return bool((extra_args or {}).get(REPORT))


@lru_cache(maxsize=1024)
def _merged(config: EvictionConfig, budget: int, prompt: Prompt) -> EvictionConfig:
    """The server's settings with a request's, checked together."""
    try:
        return config.changed(budget=budget, prompt=prompt)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise EvictionError(f"vllm_xargs.kv_eviction_*: {message}") from None
