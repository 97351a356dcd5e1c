"""The page and the figure of servers that took turns, from their results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.intervals import interval
from benchmarks.common.figures import pyplot, save
from benchmarks.serving.report import source
from vase_vllm.tools.markdown import table

FULL = "full"


def ratios(result: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each pair, the policy's speed over the full cache's."""
    policy = of_turns(result, result["policy"], "tokens_per_second")
    return policy / of_turns(result, FULL, "tokens_per_second")


def of_turns(result: dict[str, Any], name: str, key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One number of all turns of a server, in the order of the pairs; half a pair is none."""
    return np.array([pair[name][key] for pair in result["pairs"] if len(pair) == 2])


def row(result: dict[str, Any]) -> list[str]:
    """A workload's row of the page."""
    found = ratios(result)
    median, mean = f"{np.median(found):.3f}", "one pair"
    if len(found) > 1:
        first, third = np.quantile(found, (0.25, 0.75))
        median += f" ({first:.3f} to {third:.3f})"
        low, high = interval(found)
        mean = f"{found.mean():.3f} ({low:.3f} to {high:.3f})"
    names = FULL, result["policy"]
    speeds = [f"{np.median(of_turns(result, n, 'tokens_per_second')):,.0f}" for n in names]
    latencies = [f"{np.median(of_turns(result, n, 'median_itl_ms')):.1f}" for n in names]
    preempted = [f"{np.median(of_turns(result, n, 'preemptions')):.0f}" for n in names]
    return [
        result["workload"]["name"],
        result["policy"],
        result["dtype"],
        str(len(found)),
        *speeds,
        ", ".join(latencies),
        ", ".join(preempted),
        median,
        mean,
    ]


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The ratio of every pair, a column for each workload."""
    figure, axis = pyplot.subplots(figsize=(2 + 2 * len(results), 4), layout="constrained")
    names = ["\n".join(row(result)[:3]) for result in results]
    for column, result in enumerate(results):
        found = ratios(result)
        spread = np.linspace(-0.2, 0.2, len(found))
        axis.plot(column + spread, found, "o", markersize=4, alpha=0.6)
        axis.hlines(np.median(found), column - 0.3, column + 0.3, colors="#4d4d4d")
    axis.axhline(1.0, linewidth=0.8, linestyle=":", color="#4d4d4d")
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("output tokens per second / full cache's")
    save(figure, path, "paired")


def page(results: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown."""
    described = [
        f"- {result['workload']['name']}: {result['workload']['question']}; "
        f"{result['workload']['num_requests']} requests a turn, "
        f"{result['workload']['concurrency']} at a time, outputs of "
        f"{result['workload']['output_len']} tokens; {result['date'][:10]}, "
        f"`{result['command']}`"
        for result in results
    ]
    head = ["workload", "policy", "dtype", "pairs", "full cache, tokens/s", "policy, tokens/s"]
    head += [
        "ms between tokens, both",
        "preempted, both",
        "median ratio (quartiles)",
        "mean ratio (95 % interval)",
    ]
    return "\n".join(
        [
            "# Two servers that take turns",
            "",
            *source(results[0]),
            *described,
            "",
            *table(head, [row(result) for result in results]),
            "",
            "Both servers of a workload ran from the start to the end and took turns, each turn",
            "with fresh requests; a ratio is of two turns one after the other. The interval is a",
            "bootstrap over pairs.",
            "",
            "![ratios](paired.svg)",
            "",
        ]
    )


def write(directory: Path) -> str:
    """Write the page and the figure of all results in a directory; returns the page."""
    found = [json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))]
    found = [result for result in found if len(ratios(result))]
    if not found:
        return f"no pair of turns is complete in {directory}"
    plot(found, directory / "paired")
    text = page(found)
    (directory / "paired.md").write_text(text)
    return text
