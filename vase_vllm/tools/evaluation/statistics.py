"""Means with confidence intervals, by scipy."""

from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its confidence interval, which one value alone does not have."""

    mean: float
    low: float | None = None
    high: float | None = None


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean of a few values, with Student's t interval.

    A bootstrap would be too narrow here: of four values it covers the mean about 80 times in 100.
    """
    from scipy.stats import ttest_1samp

    mean = sum(values) / len(values)
    if len(set(values)) < 2:
        return Estimate(mean) if len(values) < 2 else Estimate(mean, mean, mean)
    interval = ttest_1samp(values, 0).confidence_interval(LEVEL)
    return Estimate(mean, float(interval.low), float(interval.high))


def share_estimate(successes: Sequence[bool]) -> Estimate:
    """The share of successes, with Wilson's score interval."""
    from scipy.stats import binomtest

    found = binomtest(sum(successes), len(successes))
    interval = found.proportion_ci(LEVEL, method="wilson")
    return Estimate(float(found.statistic), float(interval.low), float(interval.high))
