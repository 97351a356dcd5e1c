"""Runs this directory's tests under Triton's interpreter.

The interpreter is chosen when Triton is imported, for its own functions, and when a kernel is
defined. Here that is done with the environment variable set for these imports alone, so that no
engine that another test starts inherits it. In a process that has imported Triton already, only
``test_fresh_process.py`` is collected, which runs the others in a process of their own.
"""

import importlib
import os
import sys

import pytest

VARIABLE = "TRITON_INTERPRET"

if "triton" not in sys.modules and VARIABLE not in os.environ:
    os.environ[VARIABLE] = "1"
    try:
        for name in ("evict", "remap", "ring"):
            importlib.import_module(f"vase_vllm.kernels.{name}")
        importlib.import_module("tests.kernels.device_functions")
    finally:
        del os.environ[VARIABLE]

from tests.kernels import INTERPRETED, INTERPRETED_VLLM  # noqa: E402
from vase_vllm.kernels.checks import interpreted  # noqa: E402

if interpreted():
    from tests.support import faster_interpreter

    faster_interpreter.install()
    collect_ignore = ["test_fresh_process.py"]
else:
    collect_ignore = [*INTERPRETED, *INTERPRETED_VLLM]


def pytest_itemcollected(item):
    # NumPy warns of lanes that the kernels mask, which a GPU computes in silence.
    item.add_marker(pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"))


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """Triton reads the variable again when it imports parts of itself late."""
    if interpreted():
        monkeypatch.setenv(VARIABLE, "1")
