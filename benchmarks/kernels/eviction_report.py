"""What ``eviction.py`` measured, as a Markdown page. Needs neither torch nor vLLM."""

import math
from typing import Any

from vase_vllm.tools.markdown import table

HEAD = ("torch", "triton", "cuda", "python", "kernels", "command", "shape")
Row = dict[str, Any]


def number(value: float | str | None, unit: str = "") -> str:
    """A table cell; a smoke run measures nothing, which is NaN."""
    if value is None:
        return "no memory"
    if isinstance(value, str):
        return value.replace("|", "/")
    return "-" if math.isnan(value) else f"{value:.3g}{unit}"


def ratio(a: float | str | None, b: float | str | None) -> float | None:
    """``a / b`` where both were measured."""
    return a / b if isinstance(a, float) and isinstance(b, float) else None


def rows_of(content: dict[str, Any], kind: str) -> list[Row]:
    """The rows of a kind, those of the present kernels alone, in order."""
    rows = [
        row
        for row in content["rows"]
        if row["kind"] == kind and row["kernels"] == content["kernels"]
    ]
    return sorted(rows, key=lambda row: (row.get("budget", 0), row.get("due", row.get("batch", 0))))


def is_right(row: Row | None) -> bool:
    """Whether a shape was compared, and everything agreed."""
    return row is not None and row.get("wrong_heads") == 0 and row["ring_is_right"]


def correctness(rows: list[Row]) -> str:
    """What was compared with the reference."""
    wrong = [row["shape"] for row in rows if not is_right(row)]
    if wrong:
        return f"**WRONG: {', '.join(wrong)}**"
    return f"{len(rows)} shapes compared, all right" if rows else "**not compared (--skip-check)**"


def evictions(rows: list[Row]) -> list[str]:
    """The table of evictions, one row for each budget and number of due sequences."""
    header = ["budget", "due", "fused", "floor", "of floor", "authors", "ratio", "compiled"]
    header += ["R-KV's rule", "distinct, fused", "random, fused", "streaming, fused"]
    cells = []
    for row in rows:
        share = ratio(row["floor"], row["fused"])
        times = ratio(row["authors"], row["fused"])
        compiled = row.get("authors, compiled", "not timed")
        cells.append(
            [
                str(row["budget"]),
                str(row["due"]),
                number(row["fused"]),
                number(row["floor"]),
                "-" if share is None else number(100 * share, " %"),
                number(row["authors"]),
                "-" if times is None else number(times, "x"),
                number(compiled),
                number(row["R-KV's rule"]),
                number(row["distinct"]),
                number(row["random"]),
                number(row["streaming"]),
            ]
        )
    return table(header, cells, num_left=0)


def steps(rows: list[Row], evicting: list[Row]) -> list[str]:
    """The table of the cost per decode step, one row for each budget and batch."""
    header = ["budget", "batch", "due per step", "eviction ms", "query ring ms", "attention ms"]
    header += ["share", "xformers ms"]
    cells = []
    for row in rows:
        times = {
            other["due"]: other["fused"] for other in evicting if other["budget"] == row["budget"]
        }
        cost, share = amortised(row, times)
        cells.append(
            [
                str(row["budget"]),
                str(row["batch"]),
                f"{row['batch'] / 64:g}",
                "-" if cost is None else number(cost),
                number(row["ring"]),
                number(row["decode"]),
                "-" if share is None else number(100 * share, " %"),
                number(row["xformers"]),
            ]
        )
    return table(header, cells, num_left=0)


def amortised(step: Row, times: dict[int, float | None]) -> tuple[float | None, float | None]:
    """Cost of the evictions of a step, and its share of the attention.

    On average batch / 64 sequences are due in each step.

    Args:
        times: due sequences to the milliseconds of their eviction.
    """
    mean_due = step["batch"] / 64
    due = max((due for due in times if due <= max(1, mean_due)), default=None)
    if due is None or times[due] is None:
        return None, None
    cost = times[due] * mean_due / due
    return cost, ratio(cost + step["ring"], step["decode"])


def markdown(content: dict[str, Any]) -> str:
    """The page of a results file."""
    lines = [f"# Eviction kernels: {content['device']}", ""]
    if content["smoke"]:
        lines += ["**Smoke run under Triton's interpreter on a CPU: there are no numbers.**", ""]
    evicting = rows_of(content, "eviction")
    timed = [*evicting, *rows_of(content, "step")]
    dates = sorted({row["date"] for row in timed})
    lines += [f"- {key}: {content[key]}" for key in HEAD]
    lines += [f"- measured: {', '.join(dates) or 'nothing yet'}"]
    lines += [f"- correctness: {correctness(rows_of(content, 'check'))}"]
    for rates in rows_of(content, "rates"):
        lines.append(
            f"- copy bandwidth {number(rates['copy bytes/s'] / 1e12)} TB/s, "
            f"bf16 matmul {number(rates['matmul flop/s'] / 1e12)} TFLOP/s"
        )
    lines += [
        "",
        "Milliseconds per call, all layers and heads of all due sequences, replayed from a CUDA",
        "graph, the baselines too: launching from Python comes on top for all of them.",
        "",
        *evictions(evicting),
        "",
        "Cost per decode step, as a share of its attention alone (SDPA over a contiguous cache of",
        "budget + 32 tokens, all layers; no weights, so that the share of a whole step is less).",
        "xformers attends over the pages of evicted sequences, of budget + 1 tokens.",
        "",
        *steps(rows_of(content, "step"), evicting),
        "",
        "Splits of a head (ms); `counted` is what the launcher chooses.",
        "",
    ]
    for row in evicting:
        if "splits" in row:
            times = ", ".join(f"{splits}: {number(ms)}" for splits, ms in row["splits"].items())
            lines.append(
                f"- budget {row['budget']}, {row['due']} due: {times}; counted {row['counted']}"
            )
    return "\n".join(lines) + "\n"
