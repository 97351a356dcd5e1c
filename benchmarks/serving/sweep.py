"""What was run and what is next: a sweep over concurrency can be stopped and gone on with.

A policy's concurrency doubles until its requests no longer all ran at once, because memory was
full, or until throughput no longer grew. Every run is written to the results at once, so that a GPU
that is lent for minutes loses one run at most. A workload of one concurrency is a sweep of one run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.clock import Clock
from benchmarks.common.results import ResultsFile

GROWTH = 1.05
"""A doubled concurrency must bring this much more throughput, else the sweep ends."""
MOST_CUTS = 2
"""A run is tried this often. A second try is the first run of its call and has all of its time."""

Run = dict[str, Any]


def memory_was_full(run: Run) -> bool:
    """Requests were preempted, or at no sample did all of them run at once."""
    return bool(run["preemptions"] > 0 or run["peak_running"] < run["concurrency"])


@dataclass(frozen=True)
class Range:
    """The concurrencies of a workload: ``first`` and its doubles, up to ``most``."""

    first: int
    most: int

    def after(self, runs: list[Run]) -> tuple[int | None, str]:
        """Concurrency that follows one policy's runs of one round; None and why where none does."""
        if not runs:
            return self.first, ""
        if self.first == self.most:
            return None, ""
        last = runs[-1]
        if memory_was_full(last):
            return None, "memory was full"
        if len(runs) > 1:
            gain = last["load"]["output_throughput"] / runs[-2]["load"]["output_throughput"]
            if gain < GROWTH:
                return None, f"throughput grew by less than {GROWTH - 1:.0%}"
        if (following := 2 * last["concurrency"]) > self.most:
            return None, "--max-concurrency"
        return following, ""


class Results(ResultsFile):
    """The file of a workload's results: what it belongs to, the runs, and those that were cut off.

    Args:
        path, header, go_on: see :class:`~benchmarks.common.results.ResultsFile`.

    Raises:
        ValueError: the file's runs have another header.
    """

    def __init__(self, path: Path, header: dict[str, Any], go_on: bool = True) -> None:
        super().__init__(path, header, {"runs": [], "cuts": [], "ends": {}}, go_on)

    def next(self, policy: str, round_number: int, sweep: Range, clock: Clock) -> int | None:
        """Concurrency that is to be run next for a policy; None where its sweep has ended."""
        runs = self.content["runs"]
        own = [run for run in runs if run["policy"] == policy and run["round"] == round_number]
        concurrency, reason = sweep.after(own)
        cuts = [
            cut
            for cut in self.content["cuts"]
            if cut["policy"] == policy and cut["concurrency"] == concurrency
            # With more time than then, it is worth another try.
            if clock.minutes is not None and cut["minutes"] >= clock.minutes
        ]
        if len(cuts) >= MOST_CUTS:
            longest = max(cut["seconds"] for cut in cuts)
            reason = f"{concurrency} did not end within {longest:.0f} s"
            concurrency = None
        self.content["ends"].pop(policy, None)
        if reason:
            self.content["ends"][policy] = reason
        return concurrency

    def add(self, run: Run) -> None:
        """Keep a run."""
        self.content["runs"].append(run)
        self.write()

    def cut(self, policy: str, concurrency: int, clock: Clock, seconds: float) -> None:
        """Note that a run was cut off after ``seconds``."""
        entry = {"policy": policy, "concurrency": concurrency, "seconds": round(seconds, 1)}
        self.content["cuts"].append(entry | {"minutes": clock.minutes})
        self.write()
