"""The examples in the docstrings, those of the Triton kernels under the interpreter."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "name",
    [
        *("evict", "launch", "parameters", "philox", "remap", "ring", "scratch"),
        *("torch_distinctness", "torch_eviction", "torch_strata"),
    ],
)
def test_examples_show_what_happens(name):
    result = doctest.testmod(import_module(f"vase_vllm.kernels.{name}"))
    assert result.attempted
    assert not result.failed
