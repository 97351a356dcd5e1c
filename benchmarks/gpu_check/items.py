"""What a new GPU machine should run first, in the order of its value."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")


@dataclass(frozen=True)
class Item:
    """One check, in a process of its own.

    Attributes:
        name: as the results call it.
        command: of the minutes that it may take, and of the directory of the results.
        most_minutes: that it may take.
        least_minutes: below which it is not worth starting.
        modules: that have to be installed.
        alone: nothing runs beside it, because it times something.
    """

    name: str
    command: Callable[[float, Path], list[str]]
    most_minutes: float
    least_minutes: float
    modules: tuple[str, ...] = ()
    alone: bool = False


def script(path: str, *arguments: str) -> Callable[[float, Path], list[str]]:
    """A file of benchmarks/kernels/, which needs no installation."""
    return lambda minutes, output: [sys.executable, f"benchmarks/kernels/{path}", *arguments]


def module(name: str, *arguments: str) -> Callable[[float, Path], list[str]]:
    """A module of the benchmarks."""
    return lambda minutes, output: [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def resumed(
    command: Callable[[float, Path], list[str]],
) -> Callable[[float, Path], list[str]]:
    """A command that ends in time by itself, writes its results, and goes on the next time."""
    return lambda minutes, output: [
        *command(minutes, output),
        *("--minutes", f"{minutes:.2f}", "--output", str(output)),
    ]


ITEMS = (
    Item("device", module("gpu_check.device"), 2, 0.2),
    Item("kernels-compile", script("compile_check.py", "--device"), 3, 0.5),
    Item("kernels-exact", resumed(script("eviction.py", "--check-only", "--workers", "4")), 6, 0.5),
    *(
        Item(f"engine-{name}", module("gpu_check.engine", "--backend", name), 4, 1, ("vllm",))
        for name in BACKENDS
    ),
    Item(
        "engine-plain-torch",
        module("gpu_check.engine", "--backend", "TRITON_ATTN", "--policy", "h2o"),
        4,
        1,
        ("vllm",),
    ),
    Item("xformers", script("xformers_attention.py"), 2, 0.5, ("xformers",)),
    Item("kernels-timing", resumed(script("eviction.py", "--skip-check")), 8, 1, alone=True),
    Item(
        "server",
        resumed(module("serving.run", "--suite", "sweep-qwen3-8b-small")),
        8,
        3,
        ("vllm",),
        alone=True,
    ),
)
