"""The results of a suite as one Markdown page and one picture for each workload."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.throughput.plots import plot

Run = dict[str, Any]
COLUMNS: dict[str, tuple[Callable[[Run], float], str]] = {
    "output tokens/s": (lambda run: run["load"]["output_throughput"], "{:.1f}"),
    "tokens per engine CPU s": (lambda run: run["tokens_per_engine_cpu_second"], "{:.1f}"),
    "ms per token": (lambda run: run["load"]["median_tpot_ms"], "{:.2f}"),
    "s to first token": (lambda run: run["load"]["median_ttft_ms"] / 1e3, "{:.2f}"),
    "peak running": (lambda run: run["peak_running"], "{:.0f}"),
    "preemptions": (lambda run: run["preemptions"], "{:.0f}"),
    "evictions": (lambda run: run["evictions"] or 0, "{:.0f}"),
    "peak blocks": (lambda run: run["peak_blocks"], "{:.0f}"),
    "peak MiB": (lambda run: run["peak_rss_mib"], "{:.0f}"),
}
SPREADS = ("output tokens/s", "tokens per engine CPU s")


def by_policy(result: dict[str, Any]) -> dict[str, list[Run]]:
    """The runs of a workload for each policy, the full cache first."""
    runs: dict[str, list[Run]] = {}
    for run in sorted(result["runs"], key=lambda run: run["policy"] != "full"):
        runs.setdefault(run["policy"], []).append(run)
    return runs


def ratio(result: dict[str, Any], policy: str, column: str) -> tuple[float, float, float] | None:
    """A policy's ratio to the full cache: of the medians, least and largest within a round.

    None where either has no run that counts.
    """
    value = COLUMNS[column][0]
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


def slope(runs: list[Run], early: int = 2048) -> tuple[float, float, float] | None:
    """Mean time per token, in ms, up to ``early`` tokens, at the end, and the latter's excess."""
    pairs = []
    for run in runs:
        curve = run["time_per_token"]
        if not curve["position"] or curve["position"][-1] < 2 * early:
            return None
        index = min(i for i, position in enumerate(curve["position"]) if position >= early)
        pairs.append((curve["mean_ms"][index], curve["mean_ms"][-1]))
    if not pairs:
        return None
    first, last = (statistics.median(column) for column in zip(*pairs, strict=True))
    return first, last, last / first - 1


def section(result: dict[str, Any]) -> list[str]:
    """One workload: its question, its settings, its table."""
    workload = result["workload"]
    low, high = (workload["output_len"] * (1 + sign * workload["spread"]) for sign in (-1, 1))
    answers = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
    prefix = f" after a shared prefix of {workload['prefix_len']}" if workload["prefix_len"] else ""
    lines = [
        f"## {workload['name']}",
        "",
        f"{workload['question'][0].upper()}{workload['question'][1:]}.",
        "",
        f"{workload['num_requests']} requests, {workload['concurrency']} at a time, prompts of "
        f"{workload['input_len']} tokens{prefix}, answers of {answers}; KV memory for "
        f"{workload['kv_tokens']} tokens; medians of {workload['rounds']} rounds, the range in "
        "brackets.",
        "",
        "| policy | " + " | ".join(COLUMNS) + " | speed / full | per CPU s / full |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 2),
    ]
    notes = []
    for policy, runs in by_policy(result).items():
        good = [run for run in runs if run["status"] == "ok"]
        for run in runs:
            if run["status"] != "ok":
                reason = " ".join(run["reason"].split())[-300:]
                notes.append(f"- round {run['round']}, {policy}: **{run['status']}**: {reason}")
        cells = []
        for column, (value, form) in COLUMNS.items():
            values = [value(run) for run in good]
            if len(good) < len(runs) or not values:
                cells.append("failed" if not values else "incomplete")
                continue
            cell = form.format(statistics.median(values))
            if column in SPREADS:
                cell += f" ({form.format(min(values))} to {form.format(max(values))})"
            cells.append(cell)
        for column in SPREADS:
            own = ratio(result, policy, column)
            whole = own is not None and len(good) == len(runs)
            text = f"{own[0]:.2f} ({own[1]:.2f} to {own[2]:.2f})" if own and whole else "-"
            cells.append("1" if policy == "full" and whole else text)
        lines.append(f"| {policy} | {' | '.join(cells)} |")
        if good and (steep := slope(good)):
            notes.append(
                f"- {policy}: time per token {steep[0]:.2f} ms around position 2048, "
                f"{steep[1]:.2f} ms at the end ({steep[2]:+.0%})"
            )
    notes += [f"- {note}" for note in result.get("notes", [])]
    lines += ["", *notes, *([""] if notes else [])]
    name = f"{result['suite']}-{workload['name']}"
    return [*lines, f"![{workload['name']}]({name}.svg)", ""]


def markdown(results: list[dict[str, Any]]) -> str:
    """The page of a suite."""
    first = results[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    described = (run["server"] for r in results for run in r["runs"] if "server" in run)
    server: dict[str, str] = next(described, {})
    accelerator = first["machine"]["accelerator"] or "no accelerator"
    settings = ", ".join(f"{k} {v}" for k, v in server.items() if k != "max_concurrency")
    lines = [
        f"# Eviction against the full cache: suite {first['suite']}",
        "",
        f"- machine: {first['machine']['processor']}, {first['machine']['cores']} cores, "
        f"{accelerator}",
        f"- versions: {versions}",
        f"- model: {first['model']}, block size {first['block_size']}",
        f"- the full cache's server: {settings}",
        f"- environment: {first['environment'] or 'as it is'}",
        f"- dates: {', '.join(sorted({r['date'][:10] for r in results}))}",
        "",
        "Ratios are of medians; their range is that of the rounds. A policy with a run that "
        "crashed, was refused or failed its check has no speed. `peak MiB` is the resident memory "
        "of the engine's processes, the KV cache included as far as it was ever touched.",
        "",
    ]
    for result in results:
        lines += section(result)
    return "\n".join(lines)


def write(directory: Path, suite: str) -> str:
    """Write ``<suite>.md`` and the plots from the raw results there; returns the page."""
    paths = sorted(directory.glob(f"{suite}-*.json"))
    results = [json.loads(path.read_text()) for path in paths]
    if not results:
        return "No results."
    results.sort(key=lambda result: result["date"])
    for result in results:
        name = f"{suite}-{result['workload']['name']}"
        plot(result, by_policy(result), directory / name)
    page = markdown(results)
    (directory / f"{suite}.md").write_text(page)
    return page
