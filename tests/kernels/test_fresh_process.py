"""The interpreted tests, where this process has imported Triton without the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

from tests.kernels import INTERPRETED


def test_kernels_under_the_interpreter():
    directory = Path(__file__).parent
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *INTERPRETED],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
