"""Predicted and measured step times in one picture."""

from pathlib import Path
from typing import Any

from benchmarks.common.figures import pyplot, save


def plot(report: dict[str, Any], path: Path) -> None:
    """Write ``path``.png and ``path``.svg: lines are predicted, dots are measured."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    full = [cell for cell in report["cells"] if cell["policy"] == "full"]
    for index, batch in enumerate(sorted({cell["batch"] for cell in full})):
        row = [cell for cell in full if cell["batch"] == batch]
        lengths = [cell["length"] for cell in row]
        colour = f"C{index}"
        left.plot(lengths, [cell["predicted_ms"] for cell in row], color=colour)
        dots = [cell["measured_ms"] for cell in row]
        left.plot(lengths, dots, "o", color=colour, label=f"batch {batch}")
    left.set(xlabel="cached tokens of a sequence", ylabel="ms per decode step", title="Full cache")
    left.set_ylim(bottom=0)
    left.legend(title="dots: measured, lines: predicted", frameon=False)

    vase = [cell for cell in report["cells"] if cell["policy"] == "vase"]
    batches = [cell["batch"] for cell in vase]
    budget, window = report["budget"], report["window"]
    right.plot(batches, [cell["predicted_ms"] for cell in vase], color="C0", label="predicted")
    measured = [cell["measured_ms"] for cell in vase]
    right.plot(batches, measured, "o", color="C0", label="measured, evictions spread evenly")
    between = [cell["measured_between_evictions_ms"] for cell in vase]
    right.plot(batches, between, "x", color="C0", label="measured, between evictions")
    right.set(xlabel="batch", ylabel="ms per decode step")
    right.set_title(f"Eviction, budget {budget}, window {window} (nothing fitted)")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    summary = report["summary"]
    figure.suptitle(
        f"{report['machine']['processor']}, one thread; fitted: "
        f"{summary['fitted_bandwidth_gb_per_s']:.1f} GB/s and "
        f"{summary['fitted_overhead_ms']:.1f} ms",
        fontsize=9,
    )
    save(figure, path, "vase", dpi=120)
