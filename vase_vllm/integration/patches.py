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
InputProcessor.process_inputs       reject with HTTP 400 what can a KV manager's say in request
                                    never be served               validation
ParentRequest.get_child_info        the samples of a request draw a sample's index in what the
                                    noise of their own            scheduler sees of a request
StatLoggerManager.__init__          our metrics at /metrics, but  stat logger plugins that do not
                                    only where eviction is on     overrule --disable-log-stats
=================================== ============================= ===============================

Each calls the original and does nothing more unless eviction is on. What a worker does to the
attention layers of its own model is listed in ``worker/object_patches.py``. ``sys.excepthook``,
Python's own extension point, is set where a command line asks for eviction.
"""

import argparse
import copy
import difflib
import functools
import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vase_vllm import ADDITIONAL_CONFIG_KEY
from vase_vllm.errors import EvictionError

# vLLM loads the plugin in every process, with eviction or without: what only eviction needs is
# imported where it is asked for.
if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.parallel_sampling import ParentRequest

logger = init_logger("vllm.vase_vllm")


def apply() -> None:
    """Patch what every process may need, once per process."""
    if _is_patched(EngineArgs.create_engine_config):
        return
    EngineArgs.add_cli_args = staticmethod(_add_cli_args(EngineArgs.add_cli_args))
    EngineArgs.from_cli_args = classmethod(_from_cli_args(EngineArgs.from_cli_args.__func__))
    EngineArgs.create_engine_config = _create_engine_config(EngineArgs.create_engine_config)


def _apply_to_requests() -> None:
    """Patch what becomes of requests, in a process that makes an engine's config with eviction."""
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.parallel_sampling import ParentRequest

    if not _is_patched(ParentRequest.get_child_info):
        ParentRequest.get_child_info = _get_child_info(ParentRequest.get_child_info)
    if not _is_patched(InputProcessor.process_inputs):
        InputProcessor.process_inputs = _process_inputs(InputProcessor.process_inputs)


def _apply_to_metrics() -> None:
    """Add our metrics to vLLM's, in a process that makes an engine's config with eviction."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    if not _is_patched(StatLoggerManager.__init__):
        StatLoggerManager.__init__ = _init_stat_loggers(StatLoggerManager.__init__)


def _apply_to_uncaught_errors() -> None:
    """Let a refusal that nobody catches end the program with its one line, not a traceback."""
    if not _is_patched(sys.excepthook):
        sys.excepthook = _excepthook(sys.excepthook)


def _is_patched(function: Callable[..., Any]) -> bool:
    return hasattr(function, "__wrapped__")


def _add_cli_args(original: Callable[..., FlexibleArgumentParser]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
        from vase_vllm.integration.flags import add_flags

        parser = original(parser)
        add_flags(parser)
        return parser

    return add_cli_args


def _from_cli_args(original: Callable[..., EngineArgs]) -> Callable[..., EngineArgs]:
    @functools.wraps(original)
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        engine_args = original(cls, args)
        # Programs parse with parsers of their own, which may lack the flags.
        policy = getattr(args, "kv_eviction", "none")
        settings = getattr(args, "kv_eviction_config", None)
        if policy == "none" and settings is None:
            return engine_args
        from vase_vllm.integration.flags import settings_of

        _apply_to_uncaught_errors()
        engine_args.additional_config = {
            **engine_args.additional_config,
            ADDITIONAL_CONFIG_KEY: settings_of(policy, settings),
        }
        # API servers that this process spawns get the parsed arguments, and read them before they
        # load the plugin: what they read must say it already.
        args.additional_config = engine_args.additional_config
        return engine_args

    return from_cli_args


def _create_engine_config(original: Callable[..., VllmConfig]) -> Callable[..., VllmConfig]:
    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        if ADDITIONAL_CONFIG_KEY not in self.additional_config:
            _warn_of_misspelt_key(self.additional_config)
            return original(self, *args, **kwargs)
        from vase_vllm.integration.activation import activate, prepare

        config = prepare(self)
        vllm_config = original(self, *args, **kwargs)
        if config is not None:
            activate(vllm_config, config)
            _apply_to_requests()
            _apply_to_metrics()
        return vllm_config

    return create_engine_config


def _warn_of_misspelt_key(additional_config: Iterable[str]) -> None:
    """Say that a key which nobody reads switches nothing on."""
    for key in difflib.get_close_matches(ADDITIONAL_CONFIG_KEY, additional_config, cutoff=0.8):
        logger.warning(
            "additional_config has %r, which vase-vllm does not read: eviction is off. Did you "
            "mean %r?",
            key,
            ADDITIONAL_CONFIG_KEY,
        )


def _process_inputs(
    original: Callable[..., "EngineCoreRequest"],
) -> Callable[..., "EngineCoreRequest"]:
    @functools.wraps(original)
    def process_inputs(self: "InputProcessor", *args: Any, **kwargs: Any) -> "EngineCoreRequest":
        from vllm.exceptions import VLLMValidationError

        from vase_vllm.integration.request_check import reason_to_reject

        request = original(self, *args, **kwargs)
        if reason := reason_to_reject(self.vllm_config, request):
            raise VLLMValidationError(reason)
        return request

    return process_inputs


def _get_child_info(
    original: Callable[..., tuple[str, "SamplingParams"]],
) -> Callable[..., tuple[str, "SamplingParams"]]:
    @functools.wraps(original)
    def get_child_info(
        self: "ParentRequest", index: int, *args: Any, **kwargs: Any
    ) -> tuple[str, "SamplingParams"]:
        from vase_vllm.request_settings import SAMPLE

        request_id, params = original(self, index, *args, **kwargs)
        if index and params.seed is None:
            # Without a seed all samples share one object.
            params = copy.copy(params)
            params.extra_args = {**(params.extra_args or {}), SAMPLE: index}
        return request_id, params

    return get_child_info


def _init_stat_loggers(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(
        self: Any,
        vllm_config: VllmConfig,
        engine_idxs: list[int] | None = None,
        custom_stat_loggers: list[Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        from vase_vllm.config import EvictionConfig
        from vase_vllm.integration.metrics import EvictionStatLogger

        if EvictionConfig.from_vllm(vllm_config) is not None:
            # Before vLLM's own, which must not see what is ours among an engine's statistics.
            custom_stat_loggers = [EvictionStatLogger, *(custom_stat_loggers or [])]
        original(self, vllm_config, engine_idxs, custom_stat_loggers, *args, **kwargs)

    return init


def _excepthook(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def excepthook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, EvictionError):
            print(f"vllm: error: {error}", file=sys.stderr)
        else:
            original(kind, error, traceback)

    return excepthook
