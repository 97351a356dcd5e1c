"""Shapes that reach every path of the kernels, each compared with the reference in fp32."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.common.clock import Clock
from benchmarks.common.results import Rows
from benchmarks.kernels.eviction_report import is_right
from benchmarks.kernels.policies import (
    distinct,
    divided,
    parameters_of,
    remembering,
    snapkv,
    unscored,
)
from benchmarks.kernels.workload import Shape, ring_is_right, wrong_heads
from vase_vllm.kernels.checks import interpreted
from vase_vllm.kernels.parameters import EvictionParameters

SPLITS = (None, 3)
"""Programs that share a head: as many as the launcher counts, and another number."""
MOST_ERROR = 300
"""Characters of an error that are kept."""


def correctness_shapes() -> dict[str, Shape]:
    """Small shapes, by name; tiny ones under the interpreter."""
    base = Shape(EvictionParameters(256, 16, 64), 2, 2, 2, 2, 64)
    if interpreted():
        base = replace(base, parameters=EvictionParameters(40, 8, 10), num_layers=1)
        shapes = {"vase": base, "fp32, long": replace(base, dtype=torch.float32, extra=40)}
        shapes["snapkv"] = replace(base, parameters=snapkv(base.parameters))
        shapes["distinct"] = replace(base, parameters=distinct(base.parameters))
        shapes["remembering"] = replace(base, parameters=remembering(base.parameters))
        shapes["strata"] = replace(base, parameters=divided(base.parameters))
        for name, parameters in unscored(base.parameters).items():
            shapes[name] = replace(base, parameters=parameters)
        return {f"smoke, {name}": shape for name, shape in shapes.items()}
    qwen3 = Shape(parameters_of(1024), num_due=2, num_layers=2)
    greedy = replace(base.parameters, sampling="greedy")
    shapes = {
        "Qwen3-8B": qwen3,
        "Qwen3-8B, budget 4096": replace(qwen3, parameters=parameters_of(4096)),
    }
    shapes |= {f"{dtype}": replace(base, dtype=dtype) for dtype in (torch.float16, torch.float32)}
    shapes |= {f"D={size}": replace(base, head_size=size) for size in (96, 128, 192, 256)}
    shapes |= {f"G={size}": replace(qwen3, group_size=size) for size in (1, 5, 8, 16)}
    shapes |= {f"block={size}": replace(base, block_size=size) for size in (32, 64, 128)}
    shapes |= {f"extra={extra}": replace(base, extra=extra) for extra in (16, 240, 4000)}
    shapes["HND"] = replace(base, layout="HND")
    shapes["greedy"] = replace(base, parameters=greedy)
    shapes["snapkv"] = replace(qwen3, parameters=snapkv(qwen3.parameters))
    shapes |= distinct_shapes(base, qwen3)
    for name, parameters in unscored(parameters_of(4096)).items():
        shapes[name] = replace(qwen3, parameters=parameters)
    long = replace(base, dtype=torch.float32, extra=4000)
    for name, parameters in unscored(base.parameters).items():
        shapes[f"{name}, fp32, extra=4000"] = replace(long, parameters=parameters)
    shapes["odd budget"] = replace(base, parameters=EvictionParameters(501, 13, 77))
    return shapes


def distinct_shapes(base: Shape, qwen3: Shape) -> dict[str, Shape]:
    """Those of the policy ``distinct``, one for each shape of its whitening's tiles."""
    small = replace(base, parameters=distinct(base.parameters))
    shapes = {
        "distinct": replace(qwen3, parameters=distinct(qwen3.parameters)),
        "distinct, budget 4096": replace(qwen3, parameters=distinct(parameters_of(4096))),
        "distinct, G=8": replace(qwen3, parameters=distinct(qwen3.parameters), group_size=8),
        "distinct, extra=4000": replace(small, extra=4000),
        "distinct, remembering": replace(qwen3, parameters=remembering(qwen3.parameters)),
        "distinct, strata": replace(qwen3, parameters=divided(qwen3.parameters)),
        "distinct, strata, extra=4000": replace(
            base, parameters=divided(base.parameters), extra=4000
        ),
        "distinct, strata, remembering": replace(
            qwen3, parameters=replace(divided(qwen3.parameters), memory=0.9)
        ),
    }
    for dtype in (torch.float16, torch.float32):
        shapes[f"distinct, {dtype}"] = replace(small, dtype=dtype)
    for size in (96, 192, 256):
        shapes[f"distinct, D={size}"] = replace(small, head_size=size)
    for window in (13, 100):
        parameters = distinct(replace(base.parameters, window=window))
        shapes[f"distinct, W={window}"] = replace(small, parameters=parameters, group_size=1)
    return shapes


def wrong_parts(shape: Shape, device: torch.device) -> dict[str, Any]:
    """What of a shape is not right.

    Returns:
        ``wrong_heads`` of all evictions, and ``ring_is_right``: whether stored queries are found;
        or the ``error`` that was raised in place of them.
    """
    num_wrong = 0
    try:
        for num_splits in SPLITS:
            torch.manual_seed(0)
            num_wrong += wrong_heads(shape, device, num_splits)
        return {"wrong_heads": num_wrong, "ring_is_right": ring_is_right(shape, device)}
    except Exception as error:  # It must not cost the verdicts of the others.
        return {"error": f"{type(error).__name__}: {error}"[:MOST_ERROR]}


def compared(
    shapes: dict[str, Shape], device: torch.device, clock: Clock, workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every shape's name and ``wrong_parts``, in the order in which they end.

    Args:
        workers: processes that compare side by side: almost all of the time goes into compiling
            kernels and into the reference.

    Raises:
        OutOfTimeError: the time is over.
    """
    if workers == 1:
        for name, shape in shapes.items():
            clock.left()
            yield name, wrong_parts(shape, device)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = {pool.submit(wrong_parts, shape, device): name for name, shape in shapes.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
                clock.left()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def check(
    results: Rows, device: torch.device, clock: Clock, stamp: dict[str, Any], workers: int = 1
) -> Iterator[str]:
    """Compare every shape that is not known to be right, write each outcome, and name the wrong.

    Args:
        stamp: fields of every row that say what was compared: see ``eviction.py``.
        workers: see ``compared``.

    Raises:
        OutOfTimeError: the time is over.
    """
    key = {"kind": "check", **stamp}
    shapes = {
        name: shape
        for name, shape in correctness_shapes().items()
        if not is_right(results.find(shape=name, **key))
    }
    for name, row in compared(shapes, device, clock, workers):
        results.put({"shape": name, **key}, row)
        verdict = "right" if is_right(row) else f"WRONG: {row}"
        print(f"  {name}: {verdict}", flush=True)
        if not is_right(row):
            yield name
