"""All runs of a workload: rounds in which every policy's server starts once."""

import argparse
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import requests
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.common.clock import Clock, OutOfTimeError
from benchmarks.common.load import RunFailedError, RunTimeoutError
from benchmarks.common.monitor import Monitor
from benchmarks.common.policy import Policy
from benchmarks.common.provenance import provenance
from benchmarks.common.workload import Workload
from benchmarks.serving.measure import prepare_model, service
from benchmarks.serving.suites import Suite
from benchmarks.serving.sweep import Range, Results

START_SECONDS = 1800
"""A server has so long to be ready."""


class CheckFailedError(Exception):
    """A run of a sweep was not what it must be: the call ends."""


class Benchmark:
    """A workload's runs: all policies in turn, every other round in reverse order.

    Args:
        name: of the suite.
        policies: the ones that run.
        clock: of the call.
    """

    def __init__(
        self,
        name: str,
        suite: Suite,
        workload: Workload,
        policies: Sequence[Policy],
        args: argparse.Namespace,
        clock: Clock,
    ) -> None:
        self.suite, self.workload, self.policies = suite, workload, policies
        self.args, self.clock = args, clock
        most = workload.max_concurrency or workload.concurrency
        self.range = Range(workload.concurrency, most)
        source = provenance()
        header = {
            "suite": name,
            "smoke": suite.smoke,
            "workload": asdict(workload),
            "model": suite.model_in_results,
            "block_size": suite.block_size,
            "machine": source.pop("machine"),
            "versions": source.pop("versions"),
            "environment": suite.environment,
            "arguments": list(suite.arguments),
        }
        path = args.output / f"{name}-{workload.name}.json"
        # Rounds may be appended to those of another day; a sweep is gone on with as it began.
        must_match = header if workload.is_sweep else {}
        self.results = Results(path, must_match, go_on=args.append or workload.is_sweep)
        content = self.results.content
        content |= header | source | {"notes": content.get("notes", []) + args.note}

    def run(self) -> bool:
        """Run what is left; returns whether all runs count.

        Raises:
            CheckFailedError, OutOfTimeError: see :meth:`run_policy`.
        """
        rounds = self.args.rounds or self.workload.rounds
        done = 0
        if not self.workload.is_sweep:
            done = max((run["round"] for run in self.results.content["runs"]), default=0)
            self.results.content["workload"]["rounds"] = done + rounds
        try:
            self.run_rounds(range(done + 1, done + rounds + 1))
        finally:
            # Why each sweep ended is known after its last run.
            if self.results.content["runs"]:
                self.results.write()
        return all(run["status"] == "ok" for run in self.results.content["runs"])

    def run_rounds(self, numbers: range) -> None:
        """Run what is left of these rounds.

        Raises:
            CheckFailedError, OutOfTimeError: see :meth:`run_policy`.
        """
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}")
        with (
            tempfile.TemporaryDirectory(prefix="serving-") as directory,
            patch.dict("os.environ", self.suite.environment),
            Progress(*columns, TimeElapsedColumn(), transient=True) as progress,
        ):
            load_arguments = prepare_model(self.suite, Path(directory))
            for number in numbers:
                for policy in self.policies if number % 2 else self.policies[::-1]:
                    name = f"{self.workload.name}, round {number}, {policy.name}"
                    task = progress.add_task(name, total=None, state="starting")
                    self.run_policy(policy, number, Path(directory), load_arguments, progress, task)
                    progress.remove_task(task)

    def run_policy(
        self,
        policy: Policy,
        number: int,
        model: Path,
        load_arguments: list[str],
        progress: Progress,
        task: TaskID,
    ) -> None:
        """Go on with one policy's runs of a round on a server of its own, if any are left.

        Raises:
            CheckFailedError: a run of a sweep was not what it must be.
            OutOfTimeError: there is no time for another run.
        """
        if (concurrency := self.next(policy, number)) is None:
            return
        run: dict[str, Any]
        limit = self.clock.left()
        seconds = 0.0
        try:
            with service(
                self.suite,
                self.workload,
                policy,
                model,
                load_arguments,
                START_SECONDS if limit is None else limit,
                self.timeout(),
            ) as warm:
                while concurrency is not None:
                    # A run of twice the requests takes no less time than the one before it.
                    timeout = self.timeout(at_least=seconds)
                    load = self.workload.at(concurrency)
                    progress.update(task, total=load.num_requests * load.output_len)
                    begin = time.monotonic()
                    try:
                        run = warm.measure(
                            concurrency, timeout, lambda monitor: show(monitor, progress, task)
                        )
                    except RunTimeoutError:
                        if timeout == self.args.timeout:
                            raise
                        spent = time.monotonic() - begin
                        self.results.cut(policy.name, concurrency, self.clock, spent)
                        raise OutOfTimeError(f"stopped after {timeout:.0f} s") from None
                    head = {"serve_arguments": shlex.join(warm.arguments), "server": warm.settings}
                    self.keep(policy, number, concurrency, head | run, progress)
                    seconds = run["seconds"]
                    concurrency = self.next(policy, number)
        except (RuntimeError, RunFailedError, requests.RequestException) as error:
            # What the end of the call's time has broken off has not failed.
            self.clock.left(at_least=1)
            run = {"status": "failed", "reason": str(error)[-1500:]}
            self.keep(policy, number, concurrency or self.range.first, run, progress)

    def next(self, policy: Policy, number: int) -> int | None:
        return self.results.next(policy.name, number, self.range, self.clock)

    def timeout(self, at_least: float = 0.0) -> float:
        """Seconds that a run may take."""
        left = self.clock.left(at_least)
        return self.args.timeout if left is None else min(left, self.args.timeout)

    def keep(
        self, policy: Policy, number: int, concurrency: int, run: dict[str, Any], progress: Progress
    ) -> None:
        """Say what came of a run and write it to the results.

        Raises:
            CheckFailedError: a run of a sweep was not what it must be; it is not written.
        """
        name = f"{self.workload.name}, round {number}, {policy.name}, concurrency {concurrency}"
        if run["status"] != "ok" and self.workload.is_sweep:
            raise CheckFailedError(f"{name}: {run['reason']}")
        outcome = run.get("reason", "checks passed")
        if run["status"] == "ok" and not self.suite.smoke:
            outcome += f", {run['load']['output_throughput']:.1f} output tokens/s"
        progress.console.print(f"{name}: {outcome}", markup=False, soft_wrap=True)
        head = {"round": number, "policy": policy.name, "concurrency": concurrency}
        self.results.add(head | run)


def show(monitor: Monitor, progress: Progress, task: TaskID) -> None:
    """The state of a run in its progress bar."""
    state = (
        f"running {monitor.latest('running'):.0f}, waiting {monitor.latest('waiting'):.0f}, "
        f"preempted {monitor.latest('preemptions'):.0f}"
    )
    progress.update(task, completed=monitor.latest("generated"), state=state)
