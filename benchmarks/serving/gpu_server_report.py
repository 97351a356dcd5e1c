"""The server benchmark's results as a Markdown table and as a picture."""

import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import published

COLUMNS = {
    "output tokens/s": "output_throughput",
    "ms per token, median": "median_tpot_ms",
    "ms between tokens, p99": "p99_itl_ms",
    "ms to first token, median": "median_ttft_ms",
}
COUNTS = {"preemptions": max, "peak_running": min, "peak_blocks": max, "pool_blocks": min}
LEGEND = """\
`output tokens/s`: all answers together, from the first request to the last token, prompts and
queue included; the median over the rounds, in brackets their range. `ms per token`: a request's
mean time per token after its first, the median over requests. `ms between tokens, p99`: evictions
and other requests' prompts are in it. `ms to first token`: the time in the queue is in it.
`preemptions`: how often the server threw a running request out for want of memory, to compute it
again. `peak running`: most requests that ran at once; fewer than the concurrency means that memory
was full. `peak blocks`: most KV cache blocks in use, of those in the pool. Counts are the worst of
the rounds."""


def find(log: str, pattern: str) -> str | None:
    """What a server's log says, or None where it does not."""
    match = re.search(pattern, log)
    return match[1] if match else None


def results_path(directory: Path, header: dict[str, Any]) -> Path:
    """The results file of a machine, a model and a length of answers."""
    device = "smoke" if header["smoke"] else header["device"].lower().replace(" ", "-")
    model = header["model"].replace(" ", "-")
    return directory / f"server-{device}-{model}-{header['settings']['output_len']}.json"


def cells(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each policy and concurrency: medians over the rounds, and their range."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        runs.setdefault((run["policy"], run["concurrency"]), []).append(run)
    rows = []
    for (policy, concurrency), repeats in runs.items():
        row: dict[str, Any] = {"policy": policy, "concurrency": concurrency}
        for column, key in COLUMNS.items():
            row[column] = statistics.median(run["load"][key] for run in repeats)
        rates = [run["load"]["output_throughput"] for run in repeats]
        row["range"] = min(rates), max(rates)
        row["rounds"] = len(repeats)
        for key, worst in COUNTS.items():
            row[key] = worst(run[key] for run in repeats)
        rows.append(row)
    order = list(dict.fromkeys(row["policy"] for row in rows))
    return sorted(rows, key=lambda row: (order.index(row["policy"]), row["concurrency"]))


def in_effect(report: dict[str, Any]) -> list[str]:
    """What vLLM made of its defaults: one item for each setting, by policy where they differ."""
    servers = {run["policy"]: run["in_effect"] for run in report["runs"]}
    lines = []
    for key in next(iter(servers.values())):
        values = {policy: settings[key] for policy, settings in servers.items()}
        if len(set(values.values())) == 1:
            lines.append(f"- {key}: {next(iter(values.values()))}")
        else:
            each = ", ".join(f"{value} ({policy})" for policy, value in values.items())
            lines.append(f"- {key}: {each}")
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The report for people, published numbers in the same table. A smoke run has no numbers."""
    settings = report["settings"]
    lines = [f"# vLLM's server under load: {report['device']}", ""]
    if report["smoke"]:
        lines += ["**Smoke run of a tiny model on a CPU: there are no numbers.**", ""]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    heads = [*COLUMNS, "preemptions", "peak running", "peak blocks", "rounds"]
    lines += [
        f"- date: {report['date']}",
        f"- versions: {versions}, Python {report['python']}",
        f"- command: `{report['command']}`",
        f"- model: the shape of {report['model']}, weights made up",
        *in_effect(report),
        f"- prompts of {settings['input_len']} tokens give or take half, which share no prefix; "
        f"answers of {settings['output_len']}; window {settings['window']}",
        "",
        "| cache | concurrency | " + " | ".join(heads) + " | whose number |",
        "| --- |" + " ---: |" * (len(heads) + 1) + " --- |",
    ]
    for row in cells(report):
        numbers = [f"{row[column]:.4g}" for column in COLUMNS]
        if row["rounds"] > 1:
            low, high = row["range"]
            numbers[0] += f" ({low:.4g} to {high:.4g})"
        numbers += [f"{row['preemptions']:.0f}", f"{row['peak_running']}"]
        numbers += [f"{row['peak_blocks']} of {row['pool_blocks']}", f"{row['rounds']}"]
        if report["smoke"]:
            numbers = ["-"] * len(numbers)
        cache = f"{row['policy']} | {row['concurrency']}"
        lines.append(f"| {cache} | {' | '.join(numbers)} | measured here |")
    blanks = " | -" * (len(heads) - 1)
    for other in published.load():
        cache = f"{other.cache} ({other.system}, {other.model}, answers: {other.answers})"
        lines.append(
            f"| {cache} | {other.at_a_time} | {other.throughput}{blanks} | {other.measured_by} |"
        )
    ends = [f"- {policy}: the sweep ended, {why}." for policy, why in report["ends"].items()]
    lines += ["", LEGEND, "", *ends, *([""] if ends else [])]
    lines += ["Of the published numbers:", "", *published.notes()]
    return "\n".join(lines) + "\n"


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the page and the picture beside the results' ``path``."""
    path.with_suffix(".md").write_text(markdown(report))
    plot(report, path.with_suffix(".png"))


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
        axis.set_xscale("log", base=2)
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
