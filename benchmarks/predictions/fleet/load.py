"""Requests of reasoning users: Poisson arrivals, prompts and outputs with a long tail."""

from dataclasses import dataclass

import numpy as np

from benchmarks.predictions.fleet.replica import Request


@dataclass(frozen=True)
class Lengths:
    """A lognormal number of tokens, cut at ``longest``: the median and the spread of its log."""

    median: float
    sigma: float
    longest: int

    def draw(self, generator: np.random.Generator, size: int) -> np.ndarray:
        drawn = generator.lognormal(np.log(self.median), self.sigma, size)
        return np.clip(drawn, 1, self.longest).astype(np.int64)


@dataclass(frozen=True)
class Load:
    """Requests per second, and their lengths."""

    rate: float
    prompts: Lengths
    outputs: Lengths

    def requests(self, seconds: float, seed: int) -> list[Request]:
        """All requests of a stretch of time; the same ones for every policy and fleet."""
        generator = np.random.default_rng(seed)
        number = generator.poisson(self.rate * seconds)
        arrivals = np.sort(generator.uniform(0, seconds, number))
        prompts = self.prompts.draw(generator, number)
        outputs = self.outputs.draw(generator, number)
        return [
            Request(float(arrival), int(prompt), int(output))
            for arrival, prompt, output in zip(arrivals, prompts, outputs, strict=True)
        ]
