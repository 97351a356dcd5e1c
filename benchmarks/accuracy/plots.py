"""Accuracy over compression: a line for each method, panels for kinds of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.accuracy.methods import METHODS, Method
from benchmarks.common.figures import pyplot, save

Points = dict[str, dict[str, list[tuple[int, float, float, float]]]]
COLORS = ("#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#666666")
COLORS += ("#1f78b4", "#a6761d", "#17becf", "#b2182b", "#000000")
MARKERS = "osD^vPX<>*ph"
TITLES = {"questions_right": "questions right, %", "look_ups_right": "look-ups right, %"}
SPREAD = 1.015
"""Factor between the positions of two methods, so that their intervals do not hide each other."""


def _panel(axis: Any, lines: dict[str, list[tuple[int, float, float, float]]]) -> None:
    """One panel; ``lines``: the points of each method as (compression, mean, low, high)."""
    for index, (name, points) in enumerate(lines.items()):
        shift = SPREAD ** (index - (len(lines) - 1) / 2)
        means = [100 * mean for _, mean, _, _ in points]
        below = [100 * (mean - low) for _, mean, low, _ in points]
        above = [100 * (high - mean) for _, mean, _, high in points]
        axis.errorbar(
            [compression * shift for compression, *_ in points],
            means,
            yerr=[below, above],
            label=name,
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.2,
            capsize=3,
        )


def plot(points: Points, free: dict[int, float], path: Path) -> None:
    """Write ``path`` with .png and .svg.

    Args:
        points: as ``report.points`` gives them.
        free: compression to the share of questions that are answered before any eviction.
    """
    figure, panels = pyplot.subplots(
        len(TITLES), 4, figsize=(24, 4.4 * len(TITLES)), sharex=True, sharey=True, squeeze=False
    )
    for (mark, title), axes in zip(TITLES.items(), panels, strict=True):
        own = points.get(mark, {})

        def chosen(methods: list[Method], own: Any = own) -> dict[str, Any]:
            return {m.name: own[m.name] for m in methods if m.name in own and m.policy}

        axes[0].set_ylabel(title)
        methods = [m for m in METHODS if m.beside is None]
        _panel(axes[0], chosen([m for m in methods if not m.keeps_prompt]))
        _panel(axes[1], chosen([m for m in methods if m.keeps_prompt or m.name == "vase"]))
        for axis, name in zip(axes[2:], ("vase", "distinct"), strict=True):
            beside = [m for m in METHODS if name in (m.name, m.beside) and not m.keeps_prompt]
            _panel(axis, chosen(beside))
        for axis in axes:
            for _, mean, _, _ in own.get("full", []):
                axis.axhline(100 * mean, color="black", linestyle="--", label="full cache")
            if mark == "questions_right":
                shares = [100 * share for share in free.values()]
                axis.plot(list(free), shares, ":", color="0.6", label="before any eviction")
            axis.set_ylim(0, 103)
            axis.grid(alpha=0.25)
    compressions = sorted(
        {c for own in points.values() for line in own.values() for c, *_ in line if c > 1}
    )
    titles = (
        *("methods", "with the prompt kept, equal memory"),
        *("ablations of vase", "settings of distinct"),
    )
    for axis, title in zip(panels[0], titles, strict=True):
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_xticks(compressions, [f"{c}x" for c in compressions])
        axis.minorticks_off()
    for axis in panels[-1]:
        axis.set_xlabel("compression")
    for axis in panels[0]:
        axis.legend(frameon=False, fontsize="small", loc="upper right", bbox_to_anchor=(1, 0.97))
    figure.tight_layout()
    save(figure, path, "accuracy")
