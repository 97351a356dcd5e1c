"""Draws which positions the KV heads of a layer hold over time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgba
from matplotlib.patches import Patch

from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.tools.inspection.kept_positions import LayerHistory, Status

matplotlib.rcParams["svg.hashsalt"] = "vase-vllm inspect"
# The palette of Okabe and Ito, which is safe for colour-blind readers.
COLORS = {
    Status.SINK: "#000000",
    Status.PROTECTED: "#d55e00",
    Status.RANKED: "#56b4e9",
    Status.WINDOW: "#009e73",
    Status.ABSENT: "#eeeeee",
}
NOT_YET = "#ffffff"
WIDTH, DPI = 11.0, 120
NUM_SHARP = 1000
"""Up to this many positions, each has its own column of pixels; above, neighbours are averaged."""


@dataclass(frozen=True)
class Captions:
    """The texts in the picture of a layer.

    Attributes:
        title: title of the figure.
        settings: policy, budget and window, in smaller print.
        names: label of each status in the legend.
        prompt_len: number of prompt tokens; a line is drawn where the output starts.
    """

    title: str
    settings: str
    names: dict[Status, str]
    prompt_len: int


def draw_layer(
    history: LayerHistory, kv_heads: Sequence[int], captions: Captions, path: Path
) -> list[Path]:
    """Draw one layer: what each of ``kv_heads`` holds, with its value ranges, and all heads.

    Args:
        history: the evictions of the layer.
        kv_heads: indices of the KV heads that get a panel of their own.
        captions: the texts in the picture.
        path: where to write the picture; its suffix is replaced by .png and .svg.

    Returns:
        The paths of the files that were written.
    """
    rows = 2 * len(kv_heads) + 1
    figure, axes = pyplot.subplots(
        rows,
        1,
        figsize=(WIDTH, 1.1 + 3.2 * len(kv_heads) + 2.4),
        height_ratios=[*(0.9, 2.3) * len(kv_heads), 2.3],
        sharex=True,
        layout="constrained",
    )
    axes[0].set_title(captions.settings, loc="right", fontsize="medium", color="0.35")
    for head, above, below in zip(kv_heads, axes[0:-1:2], axes[1:-1:2], strict=True):
        above.set_title(f"KV head {head}", loc="left", fontsize="medium", fontweight="bold")
        _draw_ranges(above, history, head)
        _draw_head(below, history, head)
    _draw_all_heads(axes[-1], history)
    label = "position in the sequence (tokens)"
    if captions.prompt_len < history.positions[-1]:
        label += "; the output starts at the dotted line"
        for axis in axes:
            axis.axvline(captions.prompt_len, color="0.2", linestyle=":", linewidth=1)
    axes[-1].set_xlabel(label)
    kinds = [kind for kind in COLORS if (history.status == kind).any()]
    figure.legend(
        handles=[Patch(color=COLORS[kind], label=captions.names[kind]) for kind in kinds],
        title=captions.title,
        title_fontproperties={"size": "large", "weight": "bold"},
        loc="outside upper center",
        ncols=len(kinds),
        frameon=False,
    )
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(files[0], dpi=DPI)
    figure.savefig(files[1], dpi=DPI, metadata={"Date": None})
    pyplot.close(figure)
    return files


def _draw_ranges(axis: Axes, history: LayerHistory, head: int) -> None:
    """Draw the value range of each position, coloured by whether it was protected."""
    ranges, status = history.value_range[head], history.status[:, head]
    protected = (status == Status.PROTECTED).any(axis=0)
    sinks = (status == Status.SINK).any(axis=0)
    positions = np.arange(len(ranges)) + 0.5
    width = min(1.3, 65 * WIDTH / len(ranges))
    for which, color in (
        (~protected & ~sinks, "0.7"),
        (protected, COLORS[Status.PROTECTED]),
        (sinks, COLORS[Status.SINK]),
    ):
        axis.vlines(
            positions[which], 0, ranges[which], color=color, linewidth=width, rasterized=True
        )
    axis.set_ylim(bottom=0)
    axis.set_ylabel("value\nrange")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_head(axis: Axes, history: LayerHistory, head: int) -> None:
    """Draw the status of each position in one head, one row per eviction."""
    palette = np.array([to_rgba(COLORS[kind]) for kind in sorted(COLORS)])
    image = palette[history.status[:, head]]
    image[_not_yet(history)] = to_rgba(NOT_YET)
    _show(axis, history, image)


def _draw_all_heads(axis: Axes, history: LayerHistory) -> None:
    """Draw how many heads hold each position."""
    num_heads = history.status.shape[1]
    colors = pyplot.get_cmap("cividis_r")(np.linspace(0.15, 1, num_heads))
    palette = np.concatenate([[to_rgba(COLORS[Status.ABSENT])], colors])
    image = palette[(history.status != Status.ABSENT).sum(axis=1)]
    image[_not_yet(history)] = to_rgba(NOT_YET)
    _show(axis, history, image)
    axis.set_title("All KV heads", loc="left", fontsize="medium", fontweight="bold")
    scale = ScalarMappable(
        BoundaryNorm(np.arange(num_heads + 2) - 0.5, num_heads + 1),
        ListedColormap(palette),
    )
    bar = axis.inset_axes((1.012, 0, 0.014, 1))
    ticks = np.unique(np.linspace(0, num_heads, min(num_heads, 8) + 1).round())
    axis.figure.colorbar(scale, cax=bar, ticks=ticks, label="heads that hold it", format="%d")


def _not_yet(history: LayerHistory) -> np.ndarray:
    """Whether a position comes after an eviction: [E, P] bool."""
    return np.arange(history.status.shape[-1]) >= history.positions[:, None]


def _show(axis: Axes, history: LayerHistory, image: np.ndarray) -> None:
    """Show ``image``, [E, P, 4]. Both axes count tokens, and time runs downwards."""
    positions = history.positions
    period = int(positions[1] - positions[0]) if len(positions) > 1 else 1
    options: dict[str, Any] = {"interpolation": "nearest"}
    if image.shape[1] > NUM_SHARP:
        options = {"interpolation": "antialiased", "interpolation_stage": "rgba"}
        # Rows are repeated to the full height, so that only neighbouring positions are averaged.
        image = np.repeat(image, cdiv(DPI * 3, len(image)), axis=0)
    axis.imshow(
        image,
        extent=(0, image.shape[1], positions[-1] + period, positions[0]),
        aspect="auto",
        **options,
    )
    axis.set_ylabel("\N{LEFTWARDS ARROW} tokens so far")
    axis.spines[["top", "right"]].set_visible(False)
