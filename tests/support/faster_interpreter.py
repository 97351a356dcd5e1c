"""Triton's interpreter without work that it does in vain: the same results in a third of the time.

Every call of a device function puts the interpreter's functions in the place of those of
``triton.language``, where the launch that it runs in has put them already; the dtype of every value
is looked up in a dictionary that is built for it; and of every sum, difference and product of
integers an overflow is computed, of which nothing is told unless the interpreter is in debug mode.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

_original_patch: Callable[[Any], Any] = interpreter._patch_lang
_original_numpy_dtype: Callable[[Any], np.dtype] = interpreter._get_np_dtype
_patched_modules: set[str] = set()
"""Those whose functions have been called in the launch that runs."""


class _Scope(interpreter._LangPatchScope):
    """What a launch restores when it ends."""

    def restore(self) -> None:
        super().restore()
        _patched_modules.clear()


def _patch_once_a_launch(function: Any) -> Any:
    # What is patched depends only on the names that the function's module has.
    if function.__module__ in _patched_modules:
        return _Scope()
    _patched_modules.add(function.__module__)
    return _original_patch(function)


_numpy_dtype_of_scalar = functools.cache(_original_numpy_dtype)


def _numpy_dtype(dtype: Any) -> np.dtype:
    if isinstance(dtype.scalar, tl.pointer_type):
        return _original_numpy_dtype(dtype)
    return _numpy_dtype_of_scalar(dtype.scalar)


def install() -> None:
    """Take effect in this process, for all kernels."""
    interpreter._LangPatchScope = _Scope
    interpreter._patch_lang = _patch_once_a_launch
    interpreter._get_np_dtype = _numpy_dtype
    options = interpreter.interpreter_builder.options
    if not options.debug:
        without_checks = dataclasses.replace(options, sanitize_overflow=False)
        interpreter.interpreter_builder.options = without_checks
