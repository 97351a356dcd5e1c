"""Figures without a display, that are the same file whenever the data are the same."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure


def save(figure: Figure, path: Path, salt: str, dpi: int = 110) -> None:
    """Write ``path`` with .png and .svg, and close the figure.

    Args:
        salt: of the ids in the SVG, which are random without one.
    """
    figure.savefig(path.with_suffix(".png"), dpi=dpi)
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)
