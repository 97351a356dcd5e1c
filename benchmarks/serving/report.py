"""The results of a suite as one Markdown page and one picture for each workload."""

import json
import statistics
from pathlib import Path

from benchmarks.common import published
from benchmarks.serving.columns import (
    COLUMNS,
    RATIOS,
    SPEED,
    Result,
    Run,
    cell,
    columns,
    is_sweep,
    legend,
    ratio_cell,
)
from benchmarks.serving.plots import plot, plot_sweep
from vase_vllm.tools.markdown import table

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
BEFORE_LEGEND = """\
The full cache is vLLM as it comes. The table says what vLLM made of its defaults for each policy.
vLLM's platform for CPUs has no CUDA graphs and always switches async scheduling off, so a CPU
cannot say what eviction costs or gains under either.
"""
AFTER_LEGEND = """\
Numbers are medians over the rounds, their range in brackets. A policy with a run that crashed, was
refused or failed its check has no speed. In the pictures bars are medians with the range as
whiskers, and the first round's lines are darker than the others'.
"""
SMOKE = "**Smoke run of a tiny model on a CPU: there are no numbers.**"


def by_policy(result: Result) -> dict[str, list[Run]]:
    """The runs of a workload for each policy, the full cache first."""
    runs: dict[str, list[Run]] = {}
    for run in sorted(result["runs"], key=lambda run: run["policy"] != "full"):
        runs.setdefault(run["policy"], []).append(run)
    return runs


def by_concurrency(result: Result) -> dict[tuple[str, int], list[Run]]:
    """The runs of a workload for each policy and, in a sweep, each concurrency."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for policy, runs in by_policy(result).items():
        default = result["workload"]["concurrency"]
        for run in sorted(runs, key=lambda run: run.get("concurrency", default)):
            groups.setdefault((policy, run.get("concurrency", default)), []).append(run)
    return groups


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


def settings(results: list[Result]) -> list[str]:
    """A table of what each policy's servers said of themselves."""
    said: dict[str, dict[str, dict[str, None]]] = {}
    for result in results:
        known = {} if result["machine"]["accelerator"] else WITHOUT_GPU
        for policy, runs in by_policy(result).items():
            for run in (run for run in runs if "server" in run):
                for key, value in (known | run["server"]).items():
                    # A dict for its order: what was said, each once.
                    said.setdefault(policy, {}).setdefault(key, {})[STATES.get(value, value)] = None
    rows = [
        [policy, *(" or ".join(values.get(key, ["not recorded"])) for key in SETTINGS.values())]
        for policy, values in said.items()
    ]
    return table(["policy", *SETTINGS], rows, num_left=1 + len(SETTINGS))


def against_published(results: list[Result]) -> list[str]:
    """Each policy's best throughput at each length of outputs, above what others published."""
    value = COLUMNS[SPEED].value
    best: dict[tuple[int, str], tuple[float, int]] = {}
    for result in results:
        for (policy, concurrency), runs in by_concurrency(result).items():
            if all(run["status"] == "ok" for run in runs):
                speed = statistics.median(value(run) for run in runs)
                key = result["workload"]["output_len"], policy
                best[key] = max(best.get(key, (0.0, 0)), (speed, concurrency))
    first = results[0]
    device = first["machine"]["accelerator"] or "no GPU"
    rows = []
    for (length, policy), (speed, concurrency) in sorted(best.items()):
        number = "-" if first.get("smoke") else f"{speed:.1f}"
        where = f"measured here, {device}"
        rows.append([policy, first["model"], str(length), str(concurrency), number, where])
    for other in published.load():
        cache, numbers = f"{other.cache} ({other.system})", [other.output_tokens, other.at_a_time]
        rows.append([cache, other.model, *numbers, other.throughput, other.measured_by])
    header = ["cache", "model", "output tokens", "concurrency", SPEED, "whose number"]
    lines = ["## Best throughput, and what others published", "", *table(header, rows, num_left=2)]
    return [*lines, "", "Of the published numbers:", "", *published.notes(), ""]


def load_described(result: Result) -> str:
    """What a workload sends."""
    workload = result["workload"]
    low, high = (workload["output_len"] * (1 + sign * workload["spread"]) for sign in (-1, 1))
    outputs = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
    if workload.get("stops"):
        outputs = f"at most {outputs}, which end where the model draws one of {workload['stops']}"
    prefix = f" after a shared prefix of {workload['prefix_len']}" if workload["prefix_len"] else ""
    rounds = len({run["round"] for run in result["runs"]})
    memory = f"KV memory for {workload['kv_tokens']} tokens"
    if workload["kv_tokens"] is None:
        memory = "all the memory that vLLM gives the KV cache"
    load = f"{workload['num_requests']} requests, {workload['concurrency']} at a time"
    if is_sweep(result):
        waves = workload["num_requests"] // workload["concurrency"]
        load = f"{waves} {'requests' if waves > 1 else 'request'} for each concurrent client"
    around = f" give or take {spread:.0%}" if (spread := workload.get("input_spread")) else ""
    return (
        f"{load}, prompts of {workload['input_len']} tokens{around}{prefix}, outputs of "
        f"{outputs}; {memory}; {rounds} round{'s' if rounds > 1 else ''}."
    )


def section(result: Result) -> list[str]:
    """One workload: its question, its settings, its table."""
    workload, sweep = result["workload"], is_sweep(result)
    rows, notes = [], []
    for (policy, concurrency), runs in by_concurrency(result).items():
        good = [run for run in runs if run["status"] == "ok"]
        for run in runs:
            if run["status"] != "ok":
                reason = " ".join(run["reason"].split())[-300:]
                notes.append(f"- round {run['round']}, {policy}: **{run['status']}**: {reason}")
        cells = [cell(column, runs) for column in columns(result).values()]
        if sweep:
            head, tail = [policy, str(concurrency)], [str(len(runs))]
        else:
            head = [policy]
            tail = [ratio_cell(result, policy, name, runs) for name in RATIOS.values()]
        if result.get("smoke"):
            cells = ["-"] * len(cells)
        rows.append([*head, *cells, *tail])
        if good and not sweep and (steep := slope(good)):
            notes.append(
                f"- {policy}: time per token {steep[0]:.2f} ms around position 2048, "
                f"{steep[1]:.2f} ms at the end ({steep[2]:+.0%})"
            )
    header = ["policy", "concurrency"] if sweep else ["policy"]
    header += [*columns(result), *(["rounds"] if sweep else RATIOS)]
    ends = result.get("ends", {})
    notes += [f"- {policy}: the sweep ended, {reason}." for policy, reason in ends.items()]
    notes += [f"- {note}" for note in result.get("notes", [])]
    return [
        f"## {workload['name']}",
        "",
        f"{workload['question'][0].upper()}{workload['question'][1:]}.",
        "",
        load_described(result),
        "",
        *table(header, rows),
        "",
        *notes,
        *([""] if notes else []),
        f"![{workload['name']}]({result['suite']}-{workload['name']}.svg)",
        "",
    ]


def source(result: Result) -> tuple[str, str, str]:
    """What a page says of the machine, of the versions and of the model."""
    machine = result["machine"]
    accelerator = machine["accelerator"] or "no accelerator"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    model = f"the shape of {result['model']}; dummy weights"
    if isinstance(result["model"], dict):
        shape = ", ".join(f"{name} {number}" for name, number in result["model"].items())
        model = f"{shape}; random weights"
    if result.get("smoke"):
        model = "a tiny model; dummy weights"
    return (
        f"- machine: {machine['processor']}, {machine['cores']} cores, {accelerator}",
        f"- versions: {versions}",
        f"- model: {model}",
    )


def markdown(results: list[Result]) -> str:
    """The page of a suite."""
    first = results[0]
    machine, versions, model = source(first)
    variables = ", ".join(f"{name}={value}" for name, value in first["environment"].items())
    lines = [
        f"# Eviction against the full cache: suite {first['suite']}",
        "",
        *([SMOKE, ""] if first.get("smoke") else []),
        machine,
        versions,
        f"{model}; block size {first['block_size']}",
        f"- environment: {variables or 'as it is'}",
        f"- dates: {', '.join(sorted({r['date'][:10] for r in results}))}",
        "",
        *settings(results),
        "",
        BEFORE_LEGEND,
        *legend(results),
        "",
        AFTER_LEGEND,
    ]
    if first["machine"]["accelerator"] or first.get("smoke"):
        lines += against_published(results)
    for result in results:
        lines += section(result)
    return "\n".join(lines)


def write(directory: Path, suite: str) -> str:
    """Write ``<suite>.md`` and the plots from the raw results there; returns the page."""
    paths = sorted(directory.glob(f"{suite}-*.json"))
    results = [result for path in paths if (result := json.loads(path.read_text()))["runs"]]
    if not results:
        return "No results."
    results.sort(key=lambda result: result["date"])
    for result in results:
        path = directory / f"{suite}-{result['workload']['name']}"
        if is_sweep(result):
            plot_sweep(result, by_concurrency(result), path)
        else:
            plot(result, by_policy(result), path)
    page = markdown(results)
    (directory / f"{suite}.md").write_text(page)
    return page
