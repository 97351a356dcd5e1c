"""Arguments that several commands take, in the ways in which ``vllm serve`` takes them."""

import argparse
import re
import sys
from typing import Any, NoReturn


class FlexibleParser(argparse.ArgumentParser):
    """Takes underscores for dashes in flags, and reports an error in one line without the usage.

    vLLM's parser of the same kind is not used, because its import takes seconds and needs vLLM.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([with_dashes(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def with_dashes(argument: str) -> str:
    """Write a flag with dashes up to its value, or to a dot: the rest are keys of JSON.

    >>> with_dashes("--max_model_len=a_b"), with_dashes("--hf_overrides.rope_theta")
    ('--max-model-len=a_b', '--hf-overrides.rope_theta')
    """
    return re.sub(r"^--[^.=]*", lambda flag: flag[0].replace("_", "-"), argument)


def choose_model(command: str, positional: str | None, option: str | None) -> str:
    """The model of a command line: ``vase-vllm plan M`` or ``vase-vllm plan --model M``.

    Raises:
        ValueError: it is missing or given twice.
    """
    if positional is None and option is None:
        raise ValueError(
            "the model is missing: give a directory or a Hugging Face id, as in "
            f"vase-vllm {command} Qwen/Qwen3-8B"
        )
    if positional is not None and option is not None:
        raise ValueError(f"{positional} and --model {option}: give the model once")
    return positional or option or ""
