"""The columns of the tables, each with what it says."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Run = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        value: of a run.
        form: how the value is written.
        legend: what it is, in Markdown.
        has_range: whether its range over the rounds is shown.
    """

    value: Callable[[Run], float]
    form: str
    legend: str
    has_range: bool = False


SPEED, CPU_SPEED = "output tokens/s", "tokens per engine CPU s"
COLUMNS = {
    SPEED: Column(
        lambda run: run["load"]["output_throughput"],
        "{:.1f}",
        "output tokens of all requests over the time from the first request to the last token, by\n"
        "  `vllm bench serve`; prompts and queue are in it, and so is everything else the machine "
        "does.",
        has_range=True,
    ),
    CPU_SPEED: Column(
        lambda run: run["tokens_per_engine_cpu_second"],
        "{:.1f}",
        "the same tokens over the processor time of the engine's processes,\n"
        "  which other jobs disturb less. On a GPU it says nothing about the GPU.",
        has_range=True,
    ),
    "ms per token": Column(
        lambda run: run["load"]["median_tpot_ms"],
        "{:.2f}",
        "a request's mean time per token after its first; the median over the requests.",
    ),
    "ms between tokens, p99": Column(
        lambda run: run["load"]["p99_itl_ms"],
        "{:.2f}",
        "evictions and the prefill of other requests are in it.",
    ),
    "s to first token": Column(
        lambda run: run["load"]["median_ttft_ms"] / 1e3,
        "{:.2f}",
        "from sending to the first token, the queue included; the median.",
    ),
    "peak running": Column(
        lambda run: run["peak_running"],
        "{:.0f}",
        "most requests that ran at once, of all samples.",
    ),
    "preemptions": Column(
        lambda run: run["preemptions"],
        "{:.0f}",
        "how often a running request lost its memory to another, and had to recompute it.",
    ),
    "evictions": Column(
        lambda run: run["evictions"] or 0,
        "{:.0f}",
        "by the server's own count, which a run must match to have a speed.",
    ),
    "peak blocks": Column(
        lambda run: run["peak_blocks"], "{:.0f}", "most KV cache blocks in use at a sample."
    ),
    "blocks of the pool": Column(
        lambda run: run["pool_blocks"], "{:.0f}", "KV cache blocks that there are."
    ),
    "peak MiB": Column(
        lambda run: run["peak_rss_mib"],
        "{:.0f}",
        "resident memory of the engine's processes; of the KV cache what was ever touched.",
    ),
}
RATIOS = {"speed / full": SPEED, "per CPU s / full": CPU_SPEED}
RATIO_LEGEND = (
    "ratios of the first two columns' medians to the full cache's;\n"
    "  in brackets the least and the largest ratio within a round."
)
ONLY_IN_SWEEPS = ("ms between tokens, p99", "blocks of the pool")
NOT_IN_SWEEPS = (CPU_SPEED, "peak MiB")


def is_sweep(result: Result) -> bool:
    """Whether a workload's concurrency was swept; results of old have no such thing."""
    return result["workload"].get("max_concurrency") is not None


def columns(result: Result) -> dict[str, Column]:
    """The columns of a workload's table."""
    left_out = NOT_IN_SWEEPS if is_sweep(result) else ONLY_IN_SWEEPS
    return {name: column for name, column in COLUMNS.items() if name not in left_out}


def legend(results: list[Result]) -> list[str]:
    """An item for each column of the results' tables."""
    used = {name for result in results for name in columns(result)}
    lines = [f"- `{name}`: {COLUMNS[name].legend}" for name in COLUMNS if name in used]
    if not all(is_sweep(result) for result in results):
        lines.append(f"- {', '.join(f'`{name}`' for name in RATIOS)}: {RATIO_LEGEND}")
    return lines


def cell(column: Column, runs: list[Run]) -> str:
    """The median over the rounds, with its range where the column shows one."""
    values = [column.value(run) for run in runs if run["status"] == "ok"]
    if len(values) < len(runs) or not values:
        return "incomplete" if values else "failed"
    text = column.form.format(statistics.median(values))
    if column.has_range and len(values) > 1:
        text += f" ({column.form.format(min(values))} to {column.form.format(max(values))})"
    return text


def ratio(result: Result, policy: str, name: str) -> tuple[float, float, float] | None:
    """A policy's ratio to the full cache: of the medians, least and largest within a round.

    None where either has no run that counts.
    """
    value = COLUMNS[name].value
    per_round: dict[str, dict[int, float]] = {"full": {}, policy: {}}
    for run in result["runs"]:
        if run["status"] == "ok" and run["policy"] in per_round:
            per_round[run["policy"]][run["round"]] = value(run)
    own, full = per_round[policy], per_round["full"]
    if not (both := own.keys() & full.keys()):
        return None
    ratios = [own[index] / full[index] for index in both]
    return (
        statistics.median(own.values()) / statistics.median(full.values()),
        min(ratios),
        max(ratios),
    )


def ratio_cell(result: Result, policy: str, name: str, runs: list[Run]) -> str:
    """The ratio of a column to the full cache's, where all runs count."""
    own = ratio(result, policy, name)
    if own is None or any(run["status"] != "ok" for run in runs):
        return "-"
    if policy == "full":
        return "1"
    text = f"{own[0]:.2f}"
    return f"{text} ({own[1]:.2f} to {own[2]:.2f})" if len(runs) > 1 else text
