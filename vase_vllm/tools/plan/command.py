"""The `plan` subcommand: its arguments, its table and its JSON output."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.tools.plan.capacity import (
    Capacity,
    Plan,
    Workload,
    format_bytes,
    make_plan,
    parse_size,
)
from vase_vllm.tools.plan.gpus import GPUS
from vase_vllm.tools.plan.model_shape import DTYPES, read_model_shape

if TYPE_CHECKING:
    from rich.table import Table

    from vase_vllm.layout.schedule import EvictionSchedule

DEFAULT_BUDGETS = (2048, 4096, 6144)
DEFAULT_OUTPUT = 16384
SIZES = (
    *("gpu_memory", "kv_cache_memory", "other_memory"),
    *("max_model_len", "mean_prompt_len", "mean_output_len"),
)
H100_INTENSITY = GPUS["h100"].intensity


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="M",
        help="model directory or Hugging Face id; no weights are loaded",
    )
    add("--gpu-memory", metavar="SIZE", help="memory of one GPU, such as 80GiB, 80G or 80GB")
    add(
        "--kv-cache-memory",
        metavar="SIZE",
        help="KV cache memory of one GPU, instead of --gpu-memory",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="F",
        help="share of the GPU memory that is used, as in vLLM",
    )
    add(
        "--other-memory",
        default="2GiB",
        metavar="SIZE",
        help="estimate for activations and CUDA graphs on one GPU; vLLM measures it at start-up",
    )
    add("--tensor-parallel-size", "-tp", type=int, default=1, metavar="N", help="GPUs per replica")
    add(
        "--budget",
        nargs="+",
        action="extend",
        metavar="T",
        help="budgets to compare, in tokens; None: " + ", ".join(map(str, DEFAULT_BUDGETS)),
    )
    add("--window", type=int, default=64, metavar="W", help="tokens between evictions")
    add("--max-model-len", metavar="N", help="longest sequence in tokens; None: as in the config")
    add("--block-size", type=int, default=16, metavar="B", help="token slots per block")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of weights and KV cache")
    add("--mean-prompt-len", metavar="N", default="512", help="mean prompt length in tokens")
    add(
        "--mean-output-len",
        metavar="N",
        help=f"mean output length in tokens; None: {DEFAULT_OUTPUT}, within --max-model-len",
    )
    add("--max-num-seqs", type=int, metavar="N", help="most sequences per step; None: no limit")
    add("--json", action="store_true", help="print JSON instead of a table")


def run_plan(args: argparse.Namespace) -> int:
    _check_numbers(args)
    sizes = {
        name: _size(text, f"--{name.replace('_', '-')}")
        for name in SIZES
        if (text := getattr(args, name)) is not None
    }
    budgets = [_size(text, "--budget") for text in args.budget or DEFAULT_BUDGETS]
    model, longest = read_model_shape(args.model, args.dtype)
    tp = args.tensor_parallel_size
    memory = sizes.get("kv_cache_memory") or kv_cache_memory(
        sizes["gpu_memory"],
        args.gpu_memory_utilization,
        sizes["other_memory"],
        cdiv(model.weight_bytes, tp),
    )
    workload = _workload(args, sizes, longest, memory)
    schedules = [_schedule(budget, args.window, workload.max_model_len) for budget in budgets]
    plan = make_plan(model, tp, workload, schedules)
    if args.json:
        print(json.dumps({"workload": asdict(workload), **asdict(plan)}, indent=2))
    else:
        _print(plan, workload, args)
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    if (args.gpu_memory is None) == (args.kv_cache_memory is None):
        raise ValueError("give one of --gpu-memory and --kv-cache-memory")
    for name in ("tensor_parallel_size", "block_size", "max_num_seqs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} ({value}) must be at least 1")
    if not 0 < args.gpu_memory_utilization <= 1:
        raise ValueError(
            f"--gpu-memory-utilization ({args.gpu_memory_utilization}) must be above 0 and up to 1"
        )


def _workload(
    args: argparse.Namespace, sizes: dict[str, int], longest: int, memory: int
) -> Workload:
    max_model_len = sizes.get("max_model_len", longest)
    if max_model_len > longest:
        raise ValueError(f"--max-model-len ({max_model_len}) is above the config's {longest}")
    prompt = sizes["mean_prompt_len"]
    output = sizes.get("mean_output_len", min(DEFAULT_OUTPUT, max_model_len - prompt))
    if output < 1 or prompt + output > max_model_len:
        raise ValueError(
            f"--mean-prompt-len ({prompt}) + --mean-output-len ({output}) must be at most "
            f"--max-model-len ({max_model_len}), and the output at least 1"
        )
    return Workload(max_model_len, args.block_size, memory, prompt, output, args.max_num_seqs)


def kv_cache_memory(gpu_memory: int, utilization: float, other: int, weights: int) -> int:
    """Bytes that vLLM leaves for the KV cache: ``memory * utilization - other - weights``.

    Raises:
        ValueError: nothing is left.
    """
    left = int(gpu_memory * utilization) - other - weights
    if left <= 0:
        raise ValueError(
            f"the weights do not fit: {format_bytes(weights)} of weights and {format_bytes(other)} "
            f"of --other-memory exceed the {format_bytes(gpu_memory * utilization)} of a GPU; "
            "raise --gpu-memory or --tensor-parallel-size"
        )
    return left


def _size(text: str | int, flag: str) -> int:
    try:
        size = parse_size(str(text))
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    if size < 1 and flag not in ("--other-memory", "--mean-prompt-len"):
        raise ValueError(f"{flag} ({text}) must be above 0")
    return size


def _schedule(budget: int, window: int, max_model_len: int) -> "EvictionSchedule":
    from vase_vllm.config import EvictionConfig

    config = EvictionConfig.parse({"budget": budget, "window": window})
    if reason := config.schedule.never_evicts(max_model_len, "--budget"):
        raise ValueError(reason)
    return config.schedule


def _print(plan: Plan, workload: Workload, args: argparse.Namespace) -> None:
    """Print the table, in colour if the output is a terminal."""
    from rich.console import Console

    console = Console(
        highlight=False, soft_wrap=True, no_color=None if sys.stdout.isatty() else True
    )
    tp = args.tensor_parallel_size
    console.print(
        f"[bold]{args.model}[/]: per GPU{f' of {tp}' if tp > 1 else ''} "
        f"{format_bytes(plan.weight_bytes)} of weights, "
        f"{format_bytes(workload.kv_cache_memory)} of KV cache,\n"
        f"{format_bytes(plan.kv_bytes_per_token)} per token, "
        f"{plan.num_blocks:,} blocks of {workload.block_size} tokens"
    )
    console.print(_table(plan))
    console.print(
        "[dim]The maximum concurrency is the value that vLLM logs at start-up, for sequences of "
        f"{workload.max_model_len:,} tokens.\nThe batch is the number of sequences per step when "
        f"memory is full, at {workload.mean_prompt_len:,} + {workload.mean_output_len:,} tokens "
        "each.\nThe speed-up is a prediction for memory-bound decoding (arXiv 2211.05102, section "
        "3): the tokens\nper byte moved, B / (weights + B (cached * KV bytes + eviction)), "
        "relative to the full cache.[/]"
    )
    if any(item.intensity > H100_INTENSITY for item in plan.capacities):
        console.print(
            "[yellow]* The step needs more operations per byte than an H100 has "
            f"({H100_INTENSITY:.0f}): it is bound by\narithmetic, and the speed-up is an upper "
            "bound.[/]"
        )


def _table(plan: Plan) -> "Table":
    """A table with one column per capacity, which fits a terminal of 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for item in plan.capacities:
        name = "full cache" if item.budget is None else f"budget {item.budget}"
        table.add_column(name, justify="right", style="bold" if item.budget else "")
    columns = [_column(item) for item in plan.capacities]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    return table


def _column(item: Capacity) -> dict[str, str]:
    is_full = item.budget is None
    bound = "*" if item.intensity > H100_INTENSITY else ""
    return {
        "blocks per sequence": f"{item.blocks_per_sequence:,}",
        "  of which query ring": "-" if is_full else f"{item.state_blocks} ({item.ring_share:.1%})",
        "maximum concurrency": f"{item.max_concurrency:.2f}x",
        "sequences that fit": f"{item.max_sequences:,}",
        "batch": f"{item.batch:.1f}",
        "speed-up, memory full": f"{item.speedup:.2f}x{bound}",
        "speed-up, equal batch": f"{item.speedup_equal_batch:.2f}x",
        "eviction traffic": "-" if is_full else f"{item.eviction_traffic:.1%}",
    }
