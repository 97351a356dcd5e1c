"""The results as one Markdown page and one picture."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.common.figures import pyplot, save
from benchmarks.peers.setting import REFERENCE, SYSTEMS
from vase_vllm.tools.evaluation.statistics import mean_estimate
from vase_vllm.tools.markdown import table

Result = dict[str, Any]
NONE = "-"
COLORS = ("#4d4d4d", "#a6a6a6", "#d95f02", "#e6ab02", "#1b9e77", "#66a61e", "#7570b3")
SPEED = "output_tokens_per_second"


def runs_of(result: Result, system: str, requests: int) -> list[dict[str, Any]]:
    """One system's runs of a number of requests; none unless every one of them counts."""
    key = system, requests
    runs = [run for run in result["runs"] if (run["system"], run["requests"]) == key]
    return runs if all(run["status"] == "ok" for run in runs) else []


def names(result: Result) -> list[str]:
    """The systems that ran, in the order of the table."""
    found = {run["system"] for run in result["runs"]}
    return [system.name for system in SYSTEMS if system.name in found]


def rises(result: Result, system: str) -> list[float] | None:
    """By how much the NLL of each text exceeds that of transformers' full cache, in nats."""
    own, full = result["nll"].get(system), result["nll"].get(REFERENCE.name)
    if own is None or full is None:
        return None
    return [a - b for a, b in zip(own, full, strict=True)]


def cell(values: list[float]) -> str:
    """The median, and the range of several rounds."""
    if not values:
        return NONE
    middle = statistics.median(values)
    digits = 1 if middle < 100 else 0
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def rise_cell(values: list[float] | None) -> str:
    if values is None:
        return NONE
    found = mean_estimate(values)
    if found.high is None:
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} ± {found.high - found.mean:.3f}"


def row(result: Result, system: str) -> list[str]:
    """One line of the table."""
    speeds, peaks, warm = [], [], []
    for requests in result["setting"]["requests"]:
        runs = runs_of(result, system, requests)
        is_serial = any(run["run"] < requests for run in runs)
        speeds.append(cell([run[SPEED] for run in runs]) + " *" * is_serial)
        peaks.append(cell([run[memory(result)] for run in runs]) + " *" * is_serial)
        warm += [run["warm_rss_mib"] for run in runs]
    return [system, *speeds, cell(warm[:1]), *peaks, rise_cell(rises(result, system))]


def memory(result: Result) -> str:
    """Which memory the table shows."""
    return "peak_rss_mib" if result["setting"]["device"] == "cpu" else "peak_device_mib"


def legend(result: Result) -> list[str]:
    """What the columns mean."""
    setting = result["setting"]
    kind = "resident memory of the system's processes together, sampled ten times a second"
    if setting["device"] != "cpu":
        kind = "memory of the GPU in use, sampled ten times a second"
    bound = setting["budget"] + setting["window"]
    length = setting["prompt_len"] + setting["output_len"]
    return [
        f"- `N: tokens/s`: output tokens of N requests that are sent at once, over the time until "
        f"the last output is there. Prompts have {setting['prompt_len']} tokens, outputs "
        f"{setting['output_len']}; decoding is greedy.",
        f"- `N: MiB`: peak {kind}; `warm MiB` is the resident memory at its peak while one short "
        "request warms the system up. Pages that two processes share count twice. vLLM's pool of "
        "KV cache, as large as the run with the most requests needs, is there from the start.",
        f"- `rise of the NLL`: by how many nats per token the negative log-likelihood of "
        f"{setting['texts']} texts exceeds that of transformers' full cache, with the 95 % "
        f"interval over texts. They have {length} tokens, and "
        f"those after the first {bound} count.",
        f"- `*`: this library computes one request at a time. It ran at most "
        f"{setting['serial_requests']} of the N, one after another.",
        "",
        "Numbers are medians over the rounds, with their range in brackets. A system without a "
        "speed failed a check or crashed. Before its speed is measured, every system has written "
        f"the same first {setting['budget'] - setting['prompt_len']} tokens as transformers' full "
        "cache, greedily, to four prompts. The caches under eviction hold "
        f"{setting['budget']} to {bound} tokens per layer and KV head.",
    ]


def markdown(result: Result, picture: str) -> str:
    """The page."""
    setting, machine = result["setting"], result["machine"]
    counts = setting["requests"]
    header = ["system", *(f"{n}: tokens/s" for n in counts), "warm MiB"]
    header += [*(f"{n}: MiB" for n in counts), "rise of the NLL"]
    failures = {
        f"- {run['system']}, {run['requests']} requests, round {run['round']}: "
        f"**{run['status']}**: {' '.join(run['reason'].split())[-300:]}": None
        for run in result["runs"]
        if run["status"] != "ok"
    }
    systems = [
        f"- {name}: " + ", ".join(f"{package} {number}" for package, number in found.items())
        for name, found in result["systems"].items()
    ]
    accelerator = machine["accelerator"] or "no accelerator"
    return "\n".join(
        [
            "# Libraries that evict from the KV cache, on one model",
            "",
            f"{result['date'][:10]}, {machine['processor']}, {machine['cores']} cores, "
            f"{accelerator}; {setting['model']}, {setting['dtype']}, {setting['threads']} threads; "
            f"budget {setting['budget']}, window {setting['window']}; `{result['command']}`.",
            *(f"\n{note}" for note in result["notes"]),
            "",
            *table(header, [row(result, name) for name in names(result)]),
            "",
            *failures,
            *([""] if failures else []),
            *legend(result),
            "",
            "Versions:",
            "",
            *systems,
            "",
            f"![speed, memory and likelihood]({picture})",
            "",
        ]
    )


def plot(result: Result, path: Path) -> None:
    """Speed and memory over the number of requests, and the rise of the NLL."""
    figure, (speed, peak, nll) = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    colors = {system.name: color for system, color in zip(SYSTEMS, COLORS, strict=True)}
    counts = result["setting"]["requests"]
    for name in names(result):
        runs = {n: found for n in counts if (found := runs_of(result, name, n))}
        for axis, key in ((speed, SPEED), (peak, memory(result))):
            medians = [statistics.median(run[key] for run in found) for found in runs.values()]
            axis.plot(list(runs), medians, "o-", color=colors[name], label=name)
    for axis, title in ((speed, "output tokens per second"), (peak, "peak memory, MiB")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.set(title=title, xlabel="requests", ylim=(0, None))
    speed.legend(frameon=False, fontsize=8)
    scored = [name for name in names(result)[::-1] if rises(result, name) is not None]
    for place, name in enumerate(scored):
        nll.barh(place, statistics.fmean(rises(result, name) or [0.0]), color=colors[name])
    nll.set_yticks(range(len(scored)), scored, fontsize=8)
    nll.set(title="rise of the NLL, nats per token")
    setting = result["setting"]
    figure.suptitle(
        f"{setting['model']}, {result['machine']['accelerator'] or result['machine']['processor']}"
        f", budget {setting['budget']}, window {setting['window']}, outputs of "
        f"{setting['output_len']} tokens",
        fontsize=10,
    )
    save(figure, path, "peers")


def write(result: Result, path: Path) -> str:
    """Write the page and the picture beside the raw results; returns the page."""
    plot(result, path)
    page = markdown(result, path.with_suffix(".svg").name)
    path.with_suffix(".md").write_text(page)
    return page
