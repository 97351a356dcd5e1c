"""The results as JSON, as a Markdown table and as a picture."""

import json
from pathlib import Path
from typing import Any

from benchmarks.common.figures import pyplot, save
from vase_vllm.tools.markdown import table


def write(directory: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Write ``fleet-<gpu>`` .json, .md, .png and .svg; returns the Markdown."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"fleet-{settings['gpu']}"
    text = markdown(settings, results)
    content = {"kind": "prediction", "settings": settings, "results": results}
    path.with_suffix(".json").write_text(json.dumps(_finite(content), indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    plot(path, settings, results)
    return text


def markdown(settings: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """One row a load, GPUs of each policy; then how each chosen fleet ran."""
    policies = list(dict.fromkeys(result["policy"] for result in results))
    gpus = {(result["rate"], result["policy"]): result["gpus"] for result in results}
    lines = [
        "# GPUs for a load of reasoning requests (predicted, not measured)",
        "",
        f"{settings['model']} on {settings['gpu']}, {settings['tensor_parallel_size']} GPU(s) a "
        f"replica; outputs lognormal, median {settings['output_median']:g} tokens, sigma "
        f"{settings['output_sigma']:g}, at most {settings['max_model_len']} with the prompt; "
        f"95 % of the requests within {settings['target_ms']:g} ms per output token, waiting "
        f"included; seed {settings['seed']}.",
        "",
    ]
    rows = []
    for rate in dict.fromkeys(result["rate"] for result in results):
        full = gpus[rate, policies[0]]
        cells = [f"{full}"]
        cells += [f"{gpus[rate, p]} ({full / gpus[rate, p]:.1f}x fewer)" for p in policies[1:]]
        rows.append([f"{rate:g}", *cells])
    lines += [*table(["requests/s", *policies], rows), "", "How the smallest fleets ran:", ""]
    rows = []
    for result in results:
        chosen = result["tried"][-1]
        rows.append(
            [
                f"{result['rate']:g}",
                result["policy"],
                f"{result['gpus']}",
                f"{chosen['p50'] * 1e3:.1f}",
                f"{chosen['p95'] * 1e3:.1f}",
                f"{chosen['mean_batch']:.0f}",
                f"{chosen['tokens_per_second']:.0f}",
                f"{chosen['preemptions_per_request']:.2f}",
            ]
        )
    header = ["requests/s", "cache", "GPUs", "ms/token p50", "p95", "mean batch"]
    header += ["tokens/s per replica", "preemptions per request"]
    lines += table(header, rows, num_left=2)
    return "\n".join(lines) + "\n"


def plot(path: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """GPUs over the load, and the latency over the fleet's size at the largest load."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    largest = max(result["rate"] for result in results)
    for policy in dict.fromkeys(result["policy"] for result in results):
        rows = [result for result in results if result["policy"] == policy]
        gpus = [row["gpus"] for row in rows]
        left.plot([row["rate"] for row in rows], gpus, "o-", label=policy)
        tried = next(row["tried"] for row in rows if row["rate"] == largest)
        points = sorted(
            (item["num_replicas"], item["p95"] * 1e3) for item in tried if item["unfinished"] == 0
        )
        scale = settings["tensor_parallel_size"]
        right.plot([x * scale for x, _ in points], [y for _, y in points], "o-", label=policy)
    left.set(xlabel="requests per second", ylabel="GPUs needed", xlim=(0, None), ylim=(0, None))
    left.legend(frameon=False)
    right.axhline(settings["target_ms"], color="grey", linewidth=0.8, linestyle="--")
    right.set(xlabel="GPUs", ylabel="p95, ms per output token", yscale="log")
    right.set_title(f"{largest:g} requests per second; dashed: the target", fontsize=9)
    figure.suptitle(
        f"Predicted, not measured: {settings['model']} on {settings['gpu']}", fontsize=10
    )
    save(figure, path, "vase", dpi=120)


def _finite(value: Any) -> Any:
    """JSON has no infinity: null, in its place, is "never"."""
    if isinstance(value, float):
        return None if value == float("inf") else float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
