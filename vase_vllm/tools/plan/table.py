"""The table of a plan, as it is printed."""

import sys
from typing import TYPE_CHECKING

from vase_vllm.tools.plan.capacity import Capacity, Plan, Workload, format_bytes
from vase_vllm.tools.plan.gpus import BANDWIDTH_REACHED, GPUS, OVERHEAD, PEAK_REACHED

if TYPE_CHECKING:
    from rich.table import Table

H100_INTENSITY = GPUS["h100"].intensity


def print_plan(
    plan: Plan, workload: Workload, model: str, tensor_parallel_size: int, gpu: str | None
) -> None:
    """Print a plan, in colour if the output is a terminal.

    Args:
        gpu: name in :data:`~vase_vllm.tools.plan.gpus.GPUS` of the GPU whose speed is predicted.
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console(
        highlight=False, soft_wrap=True, no_color=None if sys.stdout.isatty() else True
    )
    of_gpus = f" of {tensor_parallel_size}" if tensor_parallel_size > 1 else ""
    console.print(
        f"[bold]{escape(model)}[/]: per GPU{of_gpus} {format_bytes(plan.weight_bytes)} of weights, "
        f"{format_bytes(workload.kv_cache_memory)} of KV cache,\n"
        f"{format_bytes(plan.kv_bytes_per_token)} per token, "
        f"{plan.num_blocks:,} blocks of {workload.block_size} tokens"
    )
    console.print(_table(plan))
    console.print(
        "[dim]The maximum concurrency is the value that vLLM logs at start-up, for sequences of "
        f"{workload.max_model_len:,} tokens.\nThe batch is the number of sequences per step when "
        f"memory is full, at {workload.mean_prompt_len:,} + {workload.mean_output_len:,} tokens "
        "each;\nunder eviction it is what fits without a preemption, as with admission: reserve.[/]"
    )
    if gpu is not None:
        console.print(_gpu_note(gpu, tensor_parallel_size))
        return
    console.print(
        "[dim]The speed-up is a prediction for memory-bound decoding (arXiv 2211.05102, section "
        "3): the tokens\nper byte moved, B / (weights + B (cached * KV bytes + eviction)), "
        "relative to the full cache.\n--gpu predicts tokens per second.[/]"
    )
    if any(item.intensity > H100_INTENSITY for item in plan.capacities):
        console.print(
            "[yellow]* The step needs more operations per byte than an H100 has "
            f"({H100_INTENSITY:.0f}): it is bound by\narithmetic, and the speed-up is an upper "
            "bound.[/]"
        )


def _gpu_note(gpu: str, tensor_parallel_size: int) -> str:
    of_gpus = f", all {tensor_parallel_size} GPUs together" if tensor_parallel_size > 1 else ""
    return (
        "[yellow]Tokens per second are the prediction of a cost model, not a measurement.[/]\n"
        f"[dim]They are the output of all sequences in decode steps, without prefill{of_gpus}.\n"
        f"Kernels are assumed to reach {BANDWIDTH_REACHED:.0%} of the bandwidth and "
        f"{PEAK_REACHED:.0%} of the peak in the data sheet of the {gpu.upper()},\nand a step to "
        f"have an overhead of {OVERHEAD * 1e3:g} ms (docs/scaling.md). The speed-up is the ratio "
        "to the full cache.[/]"
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
    rows = {
        "blocks per sequence": f"{item.blocks_per_sequence:,}",
        "  of which state": "-" if is_full else f"{item.state_blocks} ({item.state_share:.1%})",
        "maximum concurrency": f"{item.max_concurrency:.2f}x",
        "sequences that fit": f"{item.max_sequences:,}",
        "batch": f"{item.batch:.1f}",
    }
    bound = ""
    if item.tokens_per_second is not None:
        rows["tokens/s (predicted)"] = f"{item.tokens_per_second:,.0f}"
    elif item.intensity > H100_INTENSITY:
        bound = "*"
    return rows | {
        "speed-up, memory full": f"{item.speedup:.2f}x{bound}",
        "speed-up, equal batch": f"{item.speedup_equal_batch:.2f}x",
        "eviction traffic": "-" if is_full else f"{item.eviction_traffic:.1%}",
    }
