"""Every place where the plugin reaches into vLLM. There is no other.

vLLM has extension points for what the eviction needs in its engine and workers: a scheduler class,
a worker class, KV cache specs with managers of their own, backends. It has none for these:

=================================== ============================= ===============================
patched                             why                           can go when vLLM has
=================================== ============================= ===============================
EngineArgs.add_cli_args             a plugin's own flags          plugin hooks for its CLI
EngineArgs.from_cli_args            flags -> additional_config    the same
EngineArgs.create_engine_config     choose our worker and         a hook for plugins on the
                                    scheduler, refuse the rest    engine's config
InputProcessor._validate_prompt_len HTTP 400 for a prompt that    a KV manager's say in request
                                    the pool can never hold       validation
async_llm.load_stat_logger_         our metrics at /metrics, but  stat logger plugins that do not
    plugin_factories                only where eviction is on     overrule --disable-log-stats
=================================== ============================= ===============================

Each calls the original and does nothing more unless eviction is on.
"""

import argparse
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs, optional_type
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vase_vllm import ADDITIONAL_CONFIG_KEY

# vLLM loads the plugin in every process, with eviction or without: what only eviction needs is
# imported where it is asked for.
if TYPE_CHECKING:
    from pydantic import BaseModel
    from vllm.v1.engine.input_processor import InputProcessor

# Whether this process has parsed a command line that asks for eviction: then a person at a shell
# gets a refusal as one line, where a program gets the exception. vLLM copies its arguments around
# field by field, so they cannot carry this.
_at_a_shell = False


def apply() -> None:
    """Patch what every process may need, once per process."""
    if hasattr(EngineArgs.create_engine_config, "__wrapped__"):
        return
    EngineArgs.add_cli_args = staticmethod(_add_cli_args(EngineArgs.add_cli_args))
    EngineArgs.from_cli_args = classmethod(_from_cli_args(EngineArgs.from_cli_args.__func__))
    EngineArgs.create_engine_config = _create_engine_config(EngineArgs.create_engine_config)


def _apply_to_requests() -> None:
    """Patch the check of requests, in a process that makes an engine's config with eviction."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor._validate_prompt_len
    if not hasattr(original, "__wrapped__"):
        InputProcessor._validate_prompt_len = _validate_prompt_len(original)


def _apply_to_metrics() -> None:
    """Add our metrics to vLLM's, in a process that makes an engine's config with eviction."""
    from vllm.v1.engine import async_llm

    original = async_llm.load_stat_logger_plugin_factories
    if not hasattr(original, "__wrapped__"):
        async_llm.load_stat_logger_plugin_factories = _load_stat_logger_plugin_factories(original)


def _add_cli_args(original: Callable[..., FlexibleArgumentParser]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
        from vase_vllm.policies.registry import policy_names

        parser = original(parser)
        group = parser.add_argument_group(title="KVEvictionConfig", description=_describe())
        group.add_argument(
            "--kv-eviction",
            choices=("none", *policy_names()),
            default="none",
            help=f"Bound the KV cache of every sequence by evicting tokens. {_policies()}",
        )
        group.add_argument(
            "--kv-eviction-config",
            type=optional_type(json.loads),
            default=None,
            help="Settings of --kv-eviction: a JSON string or dotted keys, such as "
            "--kv-eviction-config.budget 2048.",
        )
        return parser

    return add_cli_args


def _policies() -> str:
    """Each policy and the first line of its docstring."""
    from vase_vllm.policies.registry import find_policy, policy_names

    docs = {name: find_policy(name).__doc__ or "" for name in policy_names()}
    return " ".join(f"`{name}`: {doc.partition(chr(10))[0]}" for name, doc in docs.items())


def _describe() -> str:
    """The keys, defaults and meanings of the settings, from where they are defined."""
    from vase_vllm.config import EvictionConfig
    from vase_vllm.policies.registry import find_policy, policy_names

    parts = [f"Keys of --kv-eviction-config, with their defaults: {_keys(EvictionConfig)}"]
    policies = {name: find_policy(name) for name in policy_names()}
    parts += [f"Of {name}: {_keys(each)}" for name, each in policies.items() if each.model_fields]
    return " ".join(parts)


def _keys(model: type["BaseModel"]) -> str:
    return " ".join(
        f"`{field.alias or name}` ({field.default}): {field.description}"
        for name, field in model.model_fields.items()
        if name != "policy"
    )


def _from_cli_args(original: Callable[..., EngineArgs]) -> Callable[..., EngineArgs]:
    @functools.wraps(original)
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        engine_args = original(cls, args)
        policy = getattr(args, "kv_eviction", "none")
        settings = getattr(args, "kv_eviction_config", None)
        if policy == "none":
            if settings is not None:
                raise SystemExit(
                    "vllm: error: --kv-eviction-config has no effect without --kv-eviction: "
                    "add --kv-eviction vase or remove it"
                )
            return engine_args
        if not isinstance(settings, dict | None):
            raise SystemExit("vllm: error: --kv-eviction-config: must be a JSON object")
        if settings and "policy" in settings:
            raise SystemExit(
                "vllm: error: --kv-eviction-config.policy: the policy is --kv-eviction's value; "
                "remove the key"
            )
        engine_args.additional_config = {
            **engine_args.additional_config,
            ADDITIONAL_CONFIG_KEY: {"policy": policy, **(settings or {})},
        }
        global _at_a_shell
        _at_a_shell = True
        return engine_args

    return from_cli_args


def _create_engine_config(original: Callable[..., VllmConfig]) -> Callable[..., VllmConfig]:
    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        if not (self.additional_config or {}).get(ADDITIONAL_CONFIG_KEY):
            return original(self, *args, **kwargs)
        from vase_vllm.integration.activation import activate, prepare

        try:
            config = prepare(self)
            vllm_config = original(self, *args, **kwargs)
            if config is not None:
                activate(vllm_config, config)
                _apply_to_requests()
                if not self.disable_log_stats:
                    _apply_to_metrics()
        except ValueError as error:
            if _at_a_shell and str(error).startswith("--kv-eviction"):
                raise SystemExit(f"vllm: error: {error}") from None
            raise
        return vllm_config

    return create_engine_config


def _validate_prompt_len(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def validate_prompt_len(self: "InputProcessor", prompt_len: int, prompt_type: str) -> None:
        from vllm.exceptions import VLLMValidationError

        from vase_vllm.integration.activation import check_prompt

        original(self, prompt_len, prompt_type)
        if reason := check_prompt(self.vllm_config, prompt_len):
            raise VLLMValidationError(reason)

    return validate_prompt_len


def _load_stat_logger_plugin_factories(
    original: Callable[[], list[Any]],
) -> Callable[[], list[Any]]:
    @functools.wraps(original)
    def load_stat_logger_plugin_factories() -> list[Any]:
        from vase_vllm.integration.metrics import EvictionStatLogger

        return [*original(), EvictionStatLogger]

    return load_stat_logger_plugin_factories
