"""The interpreted tests, where this process has imported Triton without the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import INTERPRETED, INTERPRETED_VLLM


@pytest.mark.parametrize("files", [INTERPRETED_VLLM, INTERPRETED], ids=["vllm", "kernels"])
def test_kernels_under_the_interpreter(files):
    directory = Path(__file__).parent
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    # Where vLLM has been imported already its files skip themselves, and nothing would be tested.
    assert files is INTERPRETED or "skipped" not in result.stdout
