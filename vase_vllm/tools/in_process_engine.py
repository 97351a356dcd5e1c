"""vLLM's engine in the process of a command, from the arguments of ``vllm serve``."""

import argparse
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vase_vllm.errors import EvictionError
from vase_vllm.tools.arguments import choose_model

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs


def parse_vllm_arguments(
    command: str, arguments: Sequence[str], model: str | None, **defaults: Any
) -> argparse.Namespace:
    """Parse vLLM's own arguments, for an engine in this process.

    Args:
        command: of ``vase-vllm``, for messages.
        arguments: those of ``vllm serve``.
        model: the model, if it is not among them.
        defaults: of the command, in place of vLLM's.

    Raises:
        ValueError: the model is missing or given twice.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = FlexibleArgumentParser(
        prog=f"vase-vllm {command}", usage=argparse.SUPPRESS, add_help=False
    )
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None, enforce_eager=True, **defaults)
    parsed = parser.parse_args(list(arguments))
    parsed.model = choose_model(command, model, parsed.model)
    return parsed


def start_engine(engine_args: "EngineArgs", label: str = "") -> "LLM":
    """Start the engine.

    Args:
        label: how a message begins.

    Raises:
        EvictionError: vLLM rejects its arguments; one line.
    """
    from pydantic import ValidationError
    from vllm import LLM

    try:
        return LLM.from_engine_args(engine_args)
    except ValidationError as error:
        # The message of pydantic itself has many lines.
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise EvictionError(f"{label}{reason}") from None


@contextmanager
def running_engine(engine_args: "EngineArgs", label: str = "") -> Iterator["LLM"]:
    """Start the engine, and end it.

    Args:
        label: how a message begins.

    Raises:
        EvictionError: vLLM rejects its arguments; one line.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = start_engine(engine_args, label)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
    finally:
        # An engine that refuses to start leaves its process groups behind as well.
        gc.collect()
        cleanup_dist_env_and_memory()
