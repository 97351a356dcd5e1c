"""Commands that are forked from a process which has imported what they need, once for all."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path


def start(
    module: str, arguments: Sequence[str], output: Path, preload: Sequence[str]
) -> ForkServerProcess:
    """Start ``python -m module arguments``; what it prints goes to a file.

    Args:
        preload: modules that it imports. Those of this process's first call are imported ahead,
            with the environment of that moment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    process = context.Process(target=_run, args=(module, arguments, output))
    process.start()
    return process


def _run(module: str, arguments: Sequence[str], output: Path) -> None:
    with output.open("w") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
