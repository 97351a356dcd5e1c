"""A fleet of replicas behind a router, and the smallest one that keeps a promise."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import simpy

from benchmarks.predictions.fleet.load import Load
from benchmarks.predictions.fleet.replica import Replica, Request, Settings


@dataclass(frozen=True)
class Clock:
    """Stretches of simulated time, in seconds.

    Attributes:
        warmup: requests that arrive in it fill the fleet and are not counted.
        measured: requests that arrive in it are counted.
        drain: the load goes on for so long, for the counted requests to end; those that have not
            ended by then count as never ended.
    """

    warmup: float = 1200.0
    measured: float = 1800.0
    drain: float = 2400.0

    @property
    def total(self) -> float:
        return self.warmup + self.measured + self.drain


@dataclass(frozen=True)
class Outcome:
    """How a fleet did.

    Attributes:
        num_replicas: of the fleet.
        num_requests: that were counted.
        unfinished: of them, still waiting or running at the end.
        p50, p95: percentiles of seconds per output token, waiting included; infinite if unfinished.
        tokens_per_second: of each replica, counted requests only.
        mean_batch: sequences of a step.
        preemptions_per_request: how often a request lost its cache.
        busy: part of the time that replicas computed.
    """

    num_replicas: int
    num_requests: int
    unfinished: int
    p50: float
    p95: float
    tokens_per_second: float
    mean_batch: float
    preemptions_per_request: float
    busy: float


def simulate(settings: Settings, load: Load, num_replicas: int, clock: Clock, seed: int) -> Outcome:
    """Run a fleet whose router gives a request to the replica with the fewest."""
    requests = load.requests(clock.total, seed)
    environment = simpy.Environment()
    replicas = [Replica(environment, settings) for _ in range(num_replicas)]
    environment.process(_route(environment, replicas, requests))
    environment.run(until=clock.total)
    end = clock.warmup + clock.measured
    counted = [request for request in requests if clock.warmup <= request.arrival < end]
    times = [request.seconds_per_token for request in counted]
    p50, p95 = np.quantile(times, [0.5, 0.95], method="higher")
    busy = sum(replica.busy_seconds for replica in replicas)
    return Outcome(
        num_replicas=num_replicas,
        num_requests=len(counted),
        unfinished=sum(request.finish == float("inf") for request in counted),
        p50=float(p50),
        p95=float(p95),
        tokens_per_second=sum(r.output for r in counted) / clock.measured / num_replicas,
        mean_batch=sum(replica.sequence_seconds for replica in replicas) / max(busy, 1e-9),
        preemptions_per_request=sum(r.preemptions for r in counted) / len(counted),
        busy=busy / clock.total / num_replicas,
    )


def _route(
    environment: simpy.Environment, replicas: list[Replica], requests: list[Request]
) -> Iterator[simpy.Event]:
    for request in requests:
        yield environment.timeout(request.arrival - environment.now)
        min(replicas, key=lambda replica: replica.load).submit(request)


def smallest_fleet(
    run: Callable[[int], Outcome], target: float, start: int = 1, largest: int = 1024
) -> list[Outcome]:
    """Outcomes of the fleets that were tried; the last one is the smallest that meets the target.

    Doubles from ``start`` (or halves, if that is enough) and then bisects.

    Args:
        run: simulates a number of replicas.
        target: most seconds per output token, for 95 % of the requests.
    """
    tried: dict[int, Outcome] = {}

    def meets(number: int) -> bool:
        if number not in tried:
            tried[number] = run(number)
        return tried[number].p95 <= target

    low, high = 0, max(1, start)
    while not meets(high):
        low, high = high, 2 * high
        if high > largest:
            raise ValueError(
                f"{largest} replicas do not meet the target: it is below a step's time"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return [outcome for number, outcome in sorted(tried.items()) if number != high] + [tried[high]]
