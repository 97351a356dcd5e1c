"""The picture of a workload: of one concurrency, or of a sweep."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.common.figures import pyplot, save
from benchmarks.serving.columns import COLUMNS, SPEED

Runs = dict[str, list[dict[str, Any]]]
SALT = "throughput"
COLORS = ("#4d4d4d", "#d95f02", "#1b9e77", "#7570b3", "#e7298a")
FIRST, LATER = 0.9, 0.35
"""Opacity of the first round's lines and of the others'."""


def _bars(axis: Any, runs: Runs, values: dict[str, list[float]], title: str) -> None:
    """A bar for each policy, the median, with a whisker over the range; "failed" without one."""
    for index, policy in enumerate(runs):
        if not (own := values.get(policy)):
            axis.text(index, 0, "failed", ha="center", va="bottom")
            continue
        middle = statistics.median(own)
        whiskers = [[middle - min(own)], [max(own) - middle]]
        axis.bar(index, middle, yerr=whiskers, capsize=4, color=COLORS[index % len(COLORS)])
    axis.set_xticks(range(len(runs)), list(runs))
    axis.set_title(title)


def _good(runs: Runs) -> Runs:
    """Policies of which every run counts."""
    return {p: own for p, own in runs.items() if all(run["status"] == "ok" for run in own)}


def _arrivals(series: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    """Time of each sample, and the requests that the server had."""
    present = [a + b for a, b in zip(series["running"], series["waiting"], strict=True)]
    return series["seconds"], present


def plot(result: dict[str, Any], runs: Runs, path: Path) -> None:
    """Speed, time per token, queue, preemptions, blocks and memory at one concurrency.

    Args:
        runs: those of each policy.
        path: written with .png and .svg.
    """
    figure, ((speed, pace, queue), (preempted, blocks, memory)) = pyplot.subplots(
        2, 3, figsize=(14, 7.5), layout="constrained"
    )
    good = _good(runs)
    throughput = {p: [r["load"]["output_throughput"] for r in own] for p, own in good.items()}
    _bars(speed, runs, throughput, "output tokens per second")
    peaks = {p: [r["peak_rss_mib"] for r in own] for p, own in good.items()}
    _bars(memory, runs, peaks, "peak resident memory of the engine, MiB")
    for index, (policy, own) in enumerate(runs.items()):
        color = COLORS[index % len(COLORS)]
        for number, run in enumerate(r for r in own if "series" in r):
            series, first = run["series"], number == 0
            label = policy if first else None
            style = {"color": color, "linewidth": 1.2, "alpha": FIRST if first else LATER}
            # The client needs a while to start: seconds count from the first request on.
            start = next((t for t, n in zip(*_arrivals(series), strict=True) if n), 0.0)
            seconds = [second - start for second in series["seconds"]]
            queue.plot(seconds, series["running"], label=label, **style)
            queue.plot(seconds, series["waiting"], linestyle=":", **style)
            preempted.plot(seconds, series["preemptions"], label=label, **style)
            blocks.plot(seconds, series["blocks"], label=label, **style)
            if policy in good:
                curve = run["time_per_token"]
                pace.plot(curve["position"], curve["mean_ms"], marker=".", label=label, **style)
    pace.set(title="ms per token over the position in the output", xlabel="token", ylim=(0, None))
    queue.set(title="requests: running (solid), waiting (dotted)", xlabel="s", xlim=(0, None))
    preempted.set(title="preemptions so far", xlabel="s", xlim=(0, None), ylim=(0, None))
    blocks.set(title="KV cache blocks held", xlabel="s", xlim=(0, None), ylim=(0, None))
    for axis in (pace, queue, preempted, blocks):
        axis.legend(frameon=False)
    workload, versions = result["workload"], result["versions"]
    figure.suptitle(
        f"{workload['name']}: {workload['question']}\n{result['machine']['processor']}, "
        f"vLLM {versions['vllm']}, rounds: {workload['rounds']}"
    )
    save(figure, path, SALT)


def plot_sweep(
    result: dict[str, Any], runs: dict[tuple[str, int], list[dict[str, Any]]], path: Path
) -> None:
    """Throughput and time per token over the concurrency, a line for each policy.

    Args:
        runs: those of each policy and concurrency.
        path: written with .png and .svg.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for policy in dict.fromkeys(policy for policy, _ in runs):
        own = {number: group for (name, number), group in runs.items() if name == policy}
        for axis, name in zip(axes, (SPEED, "ms per token"), strict=True):
            value = COLUMNS[name].value
            medians = [statistics.median(map(value, group)) for group in own.values()]
            axis.plot(list(own), medians, "o-", label=policy)
            axis.set(xlabel="concurrent requests", ylabel=name)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        if result["smoke"]:
            axis.set_yticks([])
    axes[0].legend(frameon=False)
    device = result["machine"]["accelerator"] or "no GPU"
    title = f"{device}: {result['model']}, outputs of {result['workload']['output_len']} tokens"
    figure.suptitle(f"{title}, vLLM {result['versions']['vllm']}", fontsize=9)
    save(figure, path, SALT)
