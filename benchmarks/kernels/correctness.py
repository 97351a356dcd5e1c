"""Shapes that reach every path of the kernels, each compared with the reference in fp32."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common.clock import Clock
from benchmarks.common.results import Rows
from benchmarks.kernels.policies import distinct, parameters_of, remembering, snapkv, unscored
from benchmarks.kernels.workload import Shape, ring_is_right, wrong_heads
from vase_vllm.kernels.checks import interpreted
from vase_vllm.kernels.parameters import EvictionParameters

SPLITS = (None, 3)
"""Programs that share a head: as many as the launcher counts, and another number."""


def correctness_shapes() -> dict[str, Shape]:
    """Small shapes, by name; tiny ones under the interpreter."""
    base = Shape(EvictionParameters(256, 16, 64), 2, 2, 2, 2, 64)
    if interpreted():
        base = replace(base, parameters=EvictionParameters(40, 8, 10), num_layers=1)
        shapes = {"vase": base, "fp32, long": replace(base, dtype=torch.float32, extra=40)}
        shapes["snapkv"] = replace(base, parameters=snapkv(base.parameters))
        shapes["distinct"] = replace(base, parameters=distinct(base.parameters))
        shapes["remembering"] = replace(base, parameters=remembering(base.parameters))
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
        ``wrong_heads`` of all evictions, and ``ring_is_right``: whether stored queries are found.
    """
    num_wrong = 0
    for num_splits in SPLITS:
        torch.manual_seed(0)
        num_wrong += wrong_heads(shape, device, num_splits)
    return {"wrong_heads": num_wrong, "ring_is_right": ring_is_right(shape, device)}


def is_right(row: dict[str, Any] | None) -> bool:
    """Whether a shape was compared, and everything agreed."""
    return row is not None and row["wrong_heads"] == 0 and row["ring_is_right"]


def check(
    results: Rows, device: torch.device, clock: Clock, stamp: dict[str, Any]
) -> Iterator[str]:
    """Compare every shape that is not known to be right, write each outcome, and name the wrong.

    Args:
        stamp: fields of every row that say what was compared: see ``eviction.py``.

    Raises:
        OutOfTimeError: the time is over.
    """
    for name, shape in correctness_shapes().items():
        key = {"kind": "check", "shape": name, **stamp}
        row = results.find(**key)
        if row is None or not is_right(row):
            clock.left()
            row = wrong_parts(shape, device)
            results.put(key, row)
            verdict = "right" if is_right(row) else f"WRONG: {row}"
            print(f"  {name}: {verdict}", flush=True)
        if not is_right(row):
            yield name
