"""Compile the shipped kernel configurations for several GPUs, without one.

    python benchmarks/kernels/compile_check.py          all configurations and architectures
    python benchmarks/kernels/compile_check.py --quick  the Qwen3-8B shape for sm_90, all scorings

Prints registers, shared memory and local memory of every kernel. Fails if a kernel spills registers
to local memory or needs more shared memory than its architecture has. The launches are those of the
launchers themselves, on tensors without storage.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vase_vllm.kernels.evict import PagedEviction
from vase_vllm.kernels.launch import DeviceLimits, Launch
from vase_vllm.kernels.parameters import EvictionParameters, Sampling, Scoring
from vase_vllm.kernels.remap import BatchRemap
from vase_vllm.kernels.ring import TritonRingWrite
from vase_vllm.layout.block_table_row import BlockTableRow
from vase_vllm.layout.query_ring import RingLayout

ARCHITECTURES = {
    80: DeviceLimits(108, 163 * 1024, 8),
    90: DeviceLimits(132, 227 * 1024, 9),
    100: DeviceLimits(148, 227 * 1024, 10),
    120: DeviceLimits(170, 99 * 1024, 12),
}
HEADINGS = ("kernel", "configuration", "arch", "warps", "registers", "shared", "spilled", "")
ROW = "{:17} {:33} {:7} {:>5} {:>9} {:>7} {:>7} {}"
TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Configuration:
    """A model's attention and its cache."""

    head_size: int
    group_size: int
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    sampling: Sampling = "gumbel"
    scoring: Scoring = "attention"

    def __str__(self) -> str:
        kind = self.sampling if self.scoring == "attention" else self.scoring
        return (
            f"D={self.head_size} G={self.group_size} {TYPE_NAMES[self.dtype]} "
            f"block={self.block_size} {kind}"
        )


QUICK = (
    Configuration(128, 4),
    Configuration(128, 4, scoring="uniform"),
    Configuration(128, 4, sampling="greedy", scoring="age"),
)
CONFIGURATIONS = (
    *QUICK,
    Configuration(128, 4, block_size=128, sampling="greedy"),
    Configuration(128, 4, torch.float16, block_size=32),
    Configuration(128, 4, torch.float32, block_size=64),
    Configuration(128, 1),
    Configuration(128, 5),
    Configuration(128, 8),
    Configuration(128, 16),
    Configuration(64, 8),
    Configuration(96, 1),
    Configuration(192, 2),
    Configuration(256, 4),
    Configuration(256, 2, torch.float32),
    Configuration(256, 2, torch.float32, scoring="uniform"),
    Configuration(256, 2, torch.float32, sampling="greedy", scoring="age"),
)


def shipped_launches(configuration: Configuration, limits: DeviceLimits) -> Iterator[Launch]:
    """The launches of one step of a model with 8 KV heads and 36 layers, budget 4096."""
    head_size, group_size = configuration.head_size, configuration.group_size
    block_size, num_kv_heads, num_layers, window = configuration.block_size, 8, 36, 64
    attention, sinks = configuration.scoring == "attention", 4
    parameters = EvictionParameters(
        4096,
        window,
        1024 if attention else sinks,
        sinks,
        sampling=configuration.sampling,
        scoring=configuration.scoring,
    )
    num_state_blocks = RingLayout(window, group_size, block_size).num_blocks

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    columns = BlockTableRow.NUM_HEADER + num_state_blocks + 40960 // block_size
    kv_cache = empty(1000, num_kv_heads, block_size, 2 * head_size, dtype=configuration.dtype)
    block_table = empty(128, columns)
    yield from PagedEviction(
        empty(num_layers, dtype=torch.int64),
        kv_cache,
        empty(num_layers),
        block_table,
        empty(1),
        empty(128),
        parameters,
        group_size=group_size,
        softmax_scale=head_size**-0.5,
        num_state_blocks=num_state_blocks,
        max_num_cached=parameters.budget + window,
        slot_priority=empty(1, parameters.budget) if configuration.scoring == "age" else None,
        nan_keys=empty(1),
    ).launches(limits)
    if not attention:
        # No queries are stored, and the remapping is the same.
        return
    query = empty(128, num_kv_heads * group_size, head_size, dtype=configuration.dtype)
    yield TritonRingWrite(
        empty(128, dtype=torch.int64),
        empty(129),
        empty(128),
        block_table,
        window=window,
        num_state_blocks=num_state_blocks,
    ).launch(kv_cache, query)
    yield BatchRemap(
        empty(129),
        empty(128),
        block_table,
        empty(128, dtype=torch.int64),
        empty(128),
        empty(128),
        empty(128, 40960 // block_size),
        window=window,
        block_size=kv_cache.shape[2],
        num_state_blocks=num_state_blocks,
    ).launch()


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton's launcher would compile for these arguments, and its options."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    arguments = dict(launch.arguments)
    for parameter in launch.kernel.params:
        name, value = parameter.name, arguments.pop(parameter.name)
        specialised = not parameter.do_not_specialize
        is_one = specialised and isinstance(value, int) and value == 1
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
            divisible = True
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = specialised and value % 16 == 0
        if divisible:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), arguments


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory, as ``cuobjdump`` reports them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        output = subprocess.run(
            [str(tool), "--dump-resource-usage", str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}


def main() -> int:
    """Print the table; 1 if a kernel does not fit."""
    parser = argparse.ArgumentParser(
        description="Compile the shipped kernels for several GPUs, without one."
    )
    parser.add_argument("--quick", action="store_true", help="Qwen3-8B's shape on sm_90 only")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, metavar="SM")
    options = parser.parse_args()
    configurations = QUICK if options.quick else CONFIGURATIONS
    architectures = options.arch or ([90] if options.quick else list(ARCHITECTURES))
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")

    print(f"Triton {triton.__version__}, torch {torch.__version__}")
    print(ROW.format(*HEADINGS))
    num_failed = 0
    started = time.monotonic()
    for configuration in configurations:
        for architecture in architectures:
            limits = ARCHITECTURES[architecture]
            # Launches that differ in numbers alone are one kernel.
            launches = {launch.kernel: launch for launch in shipped_launches(configuration, limits)}
            for launch in launches.values():
                source, compile_options = source_of(launch)
                compiled = triton.compile(
                    source, target=GPUTarget("cuda", architecture, 32), options=compile_options
                )
                usage = resource_usage(compiled.asm["cubin"])
                shared, spilled = compiled.metadata.shared, usage["STACK"] + usage["LOCAL"]
                failed = spilled > 0 or shared > limits.shared_memory
                num_failed += failed
                cells = (
                    launch.kernel.__name__,
                    str(configuration),
                    f"sm_{architecture}",
                    compiled.metadata.num_warps,
                    usage["REG"],
                    shared,
                    spilled,
                    "FAILED" if failed else "",
                )
                print(ROW.format(*cells).rstrip(), flush=True)
    print(f"{time.monotonic() - started:.0f} s, {num_failed} failed")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
