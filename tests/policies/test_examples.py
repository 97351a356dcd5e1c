"""The examples in the docstrings of the policies."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "candidates",
        "expected",
        "protecting",
        "query_statistics",
        "rkv",
        "streaming",
        "triattention",
        "vase",
    ],
)
def test_examples_show_what_happens(name):
    result = doctest.testmod(import_module(f"vase_vllm.policies.{name}"))
    assert result.attempted
    assert not result.failed
