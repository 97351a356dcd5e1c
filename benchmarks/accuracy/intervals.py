"""Confidence intervals of means over the problems."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Confidence interval of the mean of ``values``, float64 [problems].

    Efron's percentile bootstrap. All methods have the same resamples of the problems, so that the
    interval of the difference of two methods is a paired one.
    """
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=SEED,
    ).confidence_interval
    return float(found.low), float(found.high)
