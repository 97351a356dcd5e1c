"""Means with confidence intervals: a percentile bootstrap over the problems."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0


def resample(problems: int) -> NDArray[np.float64]:
    """Weights of the problems in each resample, float64 [RESAMPLES, problems]; rows sum to 1.

    The same for every method, so that the difference of two methods is a paired one.
    """
    rng = np.random.default_rng(SEED)
    return rng.multinomial(problems, np.full(problems, 1 / problems), RESAMPLES) / problems


def interval(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Confidence interval of the mean of ``values``, float64 [problems].

    The ends are the (1 - LEVEL) / 2 quantiles of the resampled means (Efron's percentile method).
    """
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(weights @ values, (tail, 100 - tail))
    return float(low), float(high)
