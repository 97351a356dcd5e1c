"""The examples in the docstrings of the layout."""

import doctest
from importlib import import_module
from pkgutil import walk_packages

from vase_vllm import layout


def test_examples_show_what_happens():
    modules = walk_packages(layout.__path__, prefix=f"{layout.__name__}.")
    results = [doctest.testmod(import_module(module.name)) for module in modules]
    assert sum(result.attempted for result in results)
    assert not sum(result.failed for result in results)
