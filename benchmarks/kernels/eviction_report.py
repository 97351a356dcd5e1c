"""What ``eviction.py`` measured, as a Markdown page. Needs neither torch nor vLLM."""

import math
from typing import Any

from vase_vllm.tools.markdown import table

HEAD = ("date", "torch", "triton", "cuda", "python", "command", "shape")


def number(value: float | None, unit: str = "") -> str:
    """A table cell; a smoke run measures nothing, which is NaN."""
    if value is None:
        return "no memory"
    return "-" if math.isnan(value) else f"{value:.3g}{unit}"


def ratio(a: float | None, b: float | None) -> float | None:
    """``a / b`` where both were measured."""
    return None if a is None or b is None else a / b


def evictions(rows: list[dict[str, Any]]) -> list[str]:
    """The table of evictions, one row for each budget and number of due sequences."""
    header = ["budget", "due", "fused", "floor", "of floor", "authors", "ratio", "compiled"]
    header += ["R-KV's rule", "random, fused", "streaming, fused"]
    cells = []
    for row in rows:
        share = ratio(row["floor"], row["fused"])
        cells.append(
            [
                str(row["budget"]),
                str(row["due"]),
                number(row["fused"]),
                number(row["floor"]),
                number(None if share is None else 100 * share, " %"),
                number(row["authors"]),
                number(ratio(row["authors"], row["fused"]), "x"),
                number(row["authors, compiled"]),
                number(row["R-KV's rule"]),
                number(row["random"]),
                number(row["streaming"]),
            ]
        )
    return table(header, cells, num_left=0)


def steps(amortised: dict[int, list[dict[str, Any]]]) -> list[str]:
    """The table of the cost per decode step, one row for each budget and batch."""
    header = ["budget", "batch", "due per step", "eviction ms", "query ring ms", "attention ms"]
    cells = [
        [
            str(budget),
            str(row["batch"]),
            f"{row['due']:g}",
            number(row["cost"]),
            number(row["ring"]),
            number(row["decode"]),
            number(100 * row["share"], " %"),
        ]
        for budget, rows in amortised.items()
        for row in rows
    ]
    return table([*header, "share"], cells, num_left=0)


def markdown(report: dict[str, Any]) -> str:
    """The page."""
    lines = [f"# Eviction kernels: {report['device']}", ""]
    if report["smoke"]:
        lines += ["**Smoke run under Triton's interpreter on a CPU: there are no numbers.**", ""]
    lines += [f"- {key}: {report[key]}" for key in HEAD]
    lines += [
        f"- copy bandwidth {number(report['copy bytes/s'] / 1e12)} TB/s, "
        f"bf16 matmul {number(report['matmul flop/s'] / 1e12)} TFLOP/s",
        "",
        "Milliseconds per call, all layers and heads of all due sequences.",
        "",
        *evictions(report["evictions"]),
        "",
        "Cost per decode step, as a share of its attention alone (SDPA over a contiguous cache of",
        "budget + 32 tokens, all layers; no weights, so that the share of a whole step is less).",
        "",
        *steps(report["amortised"]),
        "",
        "Splits of a head (ms); `counted` is what the launcher chooses.",
        "",
    ]
    for row in report["evictions"]:
        if "splits" in row:
            times = ", ".join(f"{splits}: {number(ms)}" for splits, ms in row["splits"].items())
            lines.append(
                f"- budget {row['budget']}, {row['due']} due: {times}; counted {row['counted']}"
            )
    return "\n".join(lines) + "\n"
