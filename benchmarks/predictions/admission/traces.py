"""Traces of requests whose past says more or less of what is to come. The same seed, the same one.

Every request is told ``MAX_TOKENS``; how long its output will be is known to nobody but the trace.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MAX_TOKENS, PROMPT_LEN = 4096, 128


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds, and the tokens of its output."""

    seconds: float
    output_len: int


Lengths = Callable[[np.random.Generator, int], np.ndarray]


def lognormal(median: float, sigma: float) -> Lengths:
    """Lengths whose logarithm is normal."""
    return lambda rng, count: rng.lognormal(np.log(median), sigma, count)


def pareto(shortest: float, exponent: float) -> Lengths:
    """Lengths with a heavy tail: below an exponent of 2 they have no variance."""
    return lambda rng, count: shortest * (1 + rng.pareto(exponent, count))


SHORT, LONG = lognormal(150, 0.6), lognormal(1800, 0.4)


def shift(before: Lengths, after: Lengths) -> Lengths:
    """One kind in the first half, another in the second."""
    return lambda rng, count: np.concatenate(
        [before(rng, count // 2), after(rng, count - count // 2)]
    )


def bursts(kinds: tuple[Lengths, ...], each: int) -> Lengths:
    """Kinds in turn, ``each`` requests of a kind."""

    def lengths(rng: np.random.Generator, count: int) -> np.ndarray:
        parts = [kinds[i % len(kinds)](rng, each) for i in range(-(-count // each))]
        return np.concatenate(parts)[:count]

    return lengths


BURST = 50
KINDS: dict[str, Lengths] = {
    "short": SHORT,
    "long": LONG,
    "heavy tail": pareto(64, 1.1),
    "short, then long": shift(SHORT, LONG),
    "long, then short": shift(LONG, SHORT),
    "bursts of short and of long ones": bursts((SHORT, LONG), BURST),
}


def make_trace(name: str, count: int, seed: int) -> list[Arrival]:
    """The requests of a trace.

    All of them wait from the start, except in bursts, which come half a minute apart.
    """
    rng = np.random.default_rng(seed)
    lengths = np.clip(KINDS[name](rng, count), 1, MAX_TOKENS).astype(int)
    is_bursty = name.startswith("bursts")
    return [
        Arrival(30.0 * (index // BURST) if is_bursty else 0.0, int(length))
        for index, length in enumerate(lengths)
    ]
