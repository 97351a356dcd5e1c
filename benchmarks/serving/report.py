"""The results of a suite as one Markdown page and one picture for each workload."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import published
from benchmarks.serving.plots import plot

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
SETTINGS = {
    "prefix caching": "prefix_caching",
    "chunked prefill": "chunked_prefill",
    "async scheduling": "async_scheduling",
    "CUDA graphs": "cuda_graphs",
    "enforce eager": "enforce_eager",
    "attention backend": "attention_backend",
}
WITHOUT_GPU = {"async_scheduling": "off", "cuda_graphs": "none"}
"""What holds on every CPU, for results whose servers did not say it."""
STATES = {"True": "on", "False": "off", "NONE": "none"}
LEGEND = """\
The full cache is vLLM as it comes. The table says what vLLM made of its defaults for each policy.
vLLM's platform for CPUs has no CUDA graphs and always switches async scheduling off, so a CPU
cannot say what eviction costs or gains under either.

- `output tokens/s`: answers' tokens over the time from the first request to the last token, by
  `vllm bench serve`; prompts and queue are in it, and so is everything else the machine does.
- `tokens per engine CPU s`: the same tokens over the processor time of the engine's processes,
  which other jobs disturb less. On a GPU it says nothing about the GPU.
- `ms per token`: a request's mean time per token after its first; the median over the requests.
- `s to first token`: from sending to the first token, the queue included; the median.
- `peak running`: most requests that ran at once, of samples every half second.
- `preemptions`: how often a running request lost its memory to another, to be computed again.
- `evictions`: by the server's own count, which a run must match to have a speed.
- `peak blocks`: most KV cache blocks in use at a sample.
- `peak MiB`: resident memory of the engine's processes; of the KV cache what was ever touched.
- `speed / full`, `per CPU s / full`: ratios of the first two columns' medians to the full cache's;
  in brackets the least and the largest ratio within a round.

Numbers are medians over the rounds, their range in brackets. A policy with a run that crashed, was
refused or failed its check has no speed. In the pictures bars are medians with the range as
whiskers, and the first round's lines are darker than the others'.
"""


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


def settings(results: list[dict[str, Any]]) -> list[str]:
    """A table of what each policy's servers said of themselves."""
    lines = [f"| policy | {' | '.join(SETTINGS)} |", "| --- |" + " --- |" * len(SETTINGS)]
    said: dict[str, dict[str, dict[str, None]]] = {}
    for result in results:
        known = {} if result["machine"]["accelerator"] else WITHOUT_GPU
        for policy, runs in by_policy(result).items():
            for run in (run for run in runs if "server" in run):
                for key, value in (known | run["server"]).items():
                    # A dict for its order: what was said, each once.
                    said.setdefault(policy, {}).setdefault(key, {})[STATES.get(value, value)] = None
    for policy, values in said.items():
        cells = [" or ".join(values.get(key, ["not recorded"])) for key in SETTINGS.values()]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return lines


def against_published(results: list[dict[str, Any]]) -> list[str]:
    """Each policy's best throughput at each length of answers, above what others published."""
    value = COLUMNS["output tokens/s"][0]
    best: dict[tuple[int, str], tuple[float, int]] = {}
    for result in results:
        workload = result["workload"]
        for policy, runs in by_policy(result).items():
            if all(run["status"] == "ok" for run in runs):
                speed = statistics.median(value(run) for run in runs)
                key = workload["output_len"], policy
                best[key] = max(best.get(key, (0.0, 0)), (speed, workload["concurrency"]))
    model, device = results[0]["model"], results[0]["machine"]["accelerator"]
    lines = [
        "## Best throughput, and what others published",
        "",
        "| cache | model | answers | concurrency | output tokens/s | whose number |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for (length, policy), (speed, concurrency) in sorted(best.items()):
        lines.append(
            f"| {policy} | {model} | {length} | {concurrency} | {speed:.1f} | "
            f"measured here, {device} |"
        )
    for other in published.load():
        lines.append(
            f"| {other.cache} ({other.system}) | {other.model} | {other.answers} | "
            f"{other.at_a_time} | {other.throughput} | {other.measured_by} |"
        )
    return [*lines, "", "Of the published numbers:", "", *published.notes(), ""]


def section(result: dict[str, Any]) -> list[str]:
    """One workload: its question, its settings, its table."""
    workload = result["workload"]
    low, high = (workload["output_len"] * (1 + sign * workload["spread"]) for sign in (-1, 1))
    answers = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
    if workload.get("stops"):
        answers = f"at most {answers}, which end where the model draws one of {workload['stops']}"
    prefix = f" after a shared prefix of {workload['prefix_len']}" if workload["prefix_len"] else ""
    rounds = len({run["round"] for run in result["runs"]})
    lines = [
        f"## {workload['name']}",
        "",
        f"{workload['question'][0].upper()}{workload['question'][1:]}.",
        "",
        f"{workload['num_requests']} requests, {workload['concurrency']} at a time, prompts of "
        f"{workload['input_len']} tokens{prefix}, answers of {answers}; KV memory for "
        f"{workload['kv_tokens']} tokens; {rounds} round{'s' if rounds > 1 else ''}.",
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
            if column in SPREADS and len(values) > 1:
                cell += f" ({form.format(min(values))} to {form.format(max(values))})"
            cells.append(cell)
        for column in SPREADS:
            own = ratio(result, policy, column)
            whole = own is not None and len(good) == len(runs)
            text = f"{own[0]:.2f}" if own and whole else "-"
            if own and whole and len(good) > 1:
                text += f" ({own[1]:.2f} to {own[2]:.2f})"
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
    accelerator = first["machine"]["accelerator"] or "no accelerator"
    model = first["model"]
    if isinstance(model, dict):
        model = ", ".join(f"{name} {number}" for name, number in model.items())
    variables = ", ".join(f"{name}={value}" for name, value in first["environment"].items())
    lines = [
        f"# Eviction against the full cache: suite {first['suite']}",
        "",
        f"- machine: {first['machine']['processor']}, {first['machine']['cores']} cores, "
        f"{accelerator}",
        f"- versions: {versions}",
        f"- model: {model}; weights made up; block size {first['block_size']}",
        f"- environment: {variables or 'as it is'}",
        f"- dates: {', '.join(sorted({r['date'][:10] for r in results}))}",
        "",
        *settings(results),
        "",
        LEGEND,
    ]
    if first["machine"]["accelerator"]:
        lines += against_published(results)
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
