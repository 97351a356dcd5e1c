"""The server benchmark's results as JSON, as a Markdown table and as a picture."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

COLUMNS = {
    "output tokens/s": "output_throughput",
    "ms per token, median": "median_tpot_ms",
    "ms between tokens, p99": "p99_itl_ms",
    "ms to first token, median": "median_ttft_ms",
}
IN_EFFECT = ("attention backend", "CUDA graph mode", "async scheduling")


def find(log: str, pattern: str) -> str | None:
    """What a server's log says, or None where it does not."""
    match = re.search(pattern, log)
    return match[1] if match else None


def cells(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each policy and concurrency: medians over the rounds, and their range."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for server in report["servers"]:
        for run in server["runs"]:
            runs.setdefault((server["policy"], run["concurrency"]), []).append(run)
    rows = []
    for (policy, concurrency), repeats in runs.items():
        row: dict[str, Any] = {"policy": policy, "concurrency": concurrency}
        for column, key in COLUMNS.items():
            row[column] = statistics.median(run["load"][key] for run in repeats)
        rates = [run["load"]["output_throughput"] for run in repeats]
        row["range"] = min(rates), max(rates)
        for key in ("preemptions", "peak_blocks"):
            row[key] = max(run[key] for run in repeats)
        rows.append(row)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report for people. A smoke run has no numbers."""
    settings = report["settings"]
    lines = [f"# vLLM's server under load: {report['device']}", ""]
    if report["smoke"]:
        lines += ["**Smoke run of a tiny model on a CPU: there are no numbers.**", ""]
    first = report["servers"][0]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines += [
        f"- date: {report['date']}",
        f"- versions: {versions}, Python {report['python']}",
        f"- command: `{report['command']}`",
        f"- model: {report['model']}",
        *(f"- {key}: {first[key]}" for key in IN_EFFECT),
        f"- prompts of {settings['input_len']} tokens give or take half, answers of "
        f"{settings['output_len']}; window {settings['window']}; medians of {settings['rounds']} "
        "rounds, in brackets the range",
        "",
        "| cache | concurrency | " + " | ".join(COLUMNS) + " | preemptions | peak blocks |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 3),
    ]
    for row in cells(report):
        numbers = [f"{row[column]:.4g}" for column in COLUMNS]
        low, high = row["range"]
        numbers[0] += f" ({low:.4g} to {high:.4g})"
        numbers += [f"{row['preemptions']:.0f}", f"{row['peak_blocks']}"]
        if report["smoke"]:
            numbers = ["-"] * len(numbers)
        lines.append(f"| {row['policy']} | {row['concurrency']} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def write(directory: Path, report: dict[str, Any]) -> Path:
    """Write the three files; returns their path without the suffix."""
    directory.mkdir(parents=True, exist_ok=True)
    device = "smoke" if report["smoke"] else report["device"].lower().replace(" ", "-")
    path = directory / f"server-{device}-{report['date']}"
    content = report | {"cells": cells(report)}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))
    plot(report, path.with_suffix(".png"))
    return path


def plot(report: dict[str, Any], path: Path) -> None:
    """Throughput and time per token over concurrency, a line for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = cells(report)
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        concurrency = [row["concurrency"] for row in own]
        for axis, column in zip(axes, list(COLUMNS)[:2], strict=True):
            axis.plot(concurrency, [row[column] for row in own], "o-", label=policy)
            axis.set(xlabel="concurrent requests", ylabel=column)
    for axis in axes:
        axis.set_ylim(bottom=0)
        if report["smoke"]:
            axis.set_yticks([])
    axes[0].legend(frameon=False)
    versions = report["versions"]
    answers = report["settings"]["output_len"]
    title = f"{report['device']}: {report['model']}, answers of {answers} tokens"
    figure.suptitle(f"{title}, vLLM {versions['vllm']}", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
