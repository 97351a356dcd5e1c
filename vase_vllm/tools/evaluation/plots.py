"""Draws how the rise of the negative log-likelihood develops over a text."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from vase_vllm.tools.evaluation.likelihood import Comparison
from vase_vllm.tools.evaluation.methods import Method
from vase_vllm.tools.evaluation.scores import Floats

matplotlib.rcParams["svg.hashsalt"] = "vase-vllm evaluate"
# The palette of Okabe and Ito, which is safe for colour-blind readers.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLES = ("-", "--", ":")
WIDTH, HEIGHT, DPI = 9.0, 3.6, 120
NUM_BINS = 24
"""Points of a curve: single positions are mostly noise."""


def draw_rises(comparisons: dict[Method, list[Comparison]], title: str, path: Path) -> list[Path]:
    """Draw the rise over the position, a panel for each budget, the mean over all texts.

    Args:
        title: title of the figure.
        path: where to write the picture; its suffix is replaced by .png and .svg.

    Returns:
        The paths of the files that were written.
    """
    budgets = list(dict.fromkeys(method.budget for method in comparisons))
    figure, axes = pyplot.subplots(
        len(budgets),
        1,
        figsize=(WIDTH, 0.6 + HEIGHT * len(budgets)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(title, fontsize="large", fontweight="bold")
    for budget, axis in zip(budgets, axes[:, 0], strict=True):
        own = {m: found for m, found in comparisons.items() if m.budget == budget}
        _draw_budget(axis, own)
    axes[-1, 0].set_xlabel("position (tokens); the first eviction is at the dotted line")
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(files[0], dpi=DPI)
    figure.savefig(files[1], metadata={"Date": None})
    pyplot.close(figure)
    return files


def binned(rises: Sequence[Floats], num_bins: int) -> tuple[Floats, Floats]:
    """The mean over texts in bins of positions; texts are cut to the shortest.

    Returns:
        Middles of the bins and means in them: [bins] each.
    """
    length = min(map(len, rises))
    mean = np.mean([own[:length] for own in rises], axis=0)
    bins = np.array_split(np.arange(length), min(num_bins, length))
    return np.array([b.mean() for b in bins]), np.array([mean[b].mean() for b in bins])


def _draw_budget(axis: Axes, comparisons: dict[Method, list[Comparison]]) -> None:
    axis.axhline(0, color="0.6", linewidth=1)
    for index, (method, found) in enumerate(comparisons.items()):
        middles, means = binned([c.rises for c in found], NUM_BINS)
        style, color = divmod(index, len(COLORS))
        axis.plot(
            middles,
            means,
            label=method.label,
            color=COLORS[color],
            linestyle=STYLES[style % len(STYLES)],
            linewidth=1.5,
        )
        if index == 0:
            axis.axvline(method.first_scored, color="0.2", linestyle=":", linewidth=1)
            axis.set_title(f"budget {method.budget}", loc="left", fontsize="medium")
    axis.set_ylabel("rise of the NLL (nats)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
