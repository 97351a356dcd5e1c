"""Runs the items, each in a process of its own, and says what came of them."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common.clock import Clock, OutOfTimeError
from benchmarks.common.exit_codes import SKIPPED
from benchmarks.common.paths import ROOT
from benchmarks.common.results import Rows
from benchmarks.gpu_check.items import Item

PASSED, FAILED, LEFT_OUT = "passed", "failed", "skipped"
GRACE_SECONDS = 45
"""What an item that is told to end has for it: a server of its own gets 30 s, see ``Server``."""
POLL_SECONDS = 0.2
SIGN_OFF_SECONDS = 10
"""What an item with a clock of its own has after it, to write its results."""
REASON = re.compile(
    r"^(?:FAILED|OUT OF TIME|error:|[\w.]*(?:Error|Exception|Interrupt|SystemExit)\b:?).*$", re.M
)
MOST_REASON = 300


@dataclass(frozen=True)
class Outcome:
    """What came of an item.

    Attributes:
        verdict: ``PASSED``, ``FAILED`` or ``LEFT_OUT``.
        reason: one line; empty if it passed.
        seconds: that it took.
        command: that was run; empty if none was.
    """

    verdict: str
    reason: str = ""
    seconds: float = 0.0
    command: str = ""


def reason_of(output: str, verdict: str) -> str:
    """The line of an item's output that says why: the last error, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if verdict == FAILED and (errors := REASON.findall(output)):
        lines = errors
    return lines[-1][:MOST_REASON] if lines else "it printed nothing"


class Running:
    """An item's process, which writes to a log in ``output``.

    Raises:
        OutOfTimeError: there is too little time for it.
    """

    def __init__(self, item: Item, clock: Clock, output: Path) -> None:
        left = clock.left(60 * item.least_minutes + GRACE_SECONDS)
        self.seconds = 60 * item.most_minutes
        if left is not None:
            self.seconds = min(self.seconds, left - GRACE_SECONDS)
        own_clock = max(self.seconds - SIGN_OFF_SECONDS, self.seconds / 2)
        self.command = item.command(own_clock / 60, output)
        self.log = output / "logs" / f"{item.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        python_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                self.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(python_path), "PYTHONUNBUFFERED": "1"},
                process_group=0,
            )
        self.begin = time.monotonic()

    def outcome(self) -> Outcome | None:
        """What came of it; None while it may go on."""
        code = self.process.poll()
        spent = time.monotonic() - self.begin
        if code is None and spent < self.seconds:
            return None
        self.end()
        facts = round(spent, 1), shlex.join(self.command)
        if code is None:
            return Outcome(FAILED, f"not done after {self.seconds:.0f} s", *facts)
        verdict = {0: PASSED, SKIPPED: LEFT_OUT}.get(code, FAILED)
        text = self.log.read_text(errors="replace")
        return Outcome(verdict, "" if verdict == PASSED else reason_of(text, verdict), *facts)

    def end(self) -> None:
        """Tell it to end if it has not, and kill what it leaves behind: that may hold the GPU."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_all(
    items: Sequence[Item],
    results: Rows,
    clock: Clock,
    source: str,
    say: Callable[[str], None] = print,
    jobs: int = 1,
) -> dict[str, Outcome]:
    """Run the items that have not passed yet, and write every outcome.

    Args:
        source: digest of the sources: what has passed with others is run again.
        jobs: items that run side by side at most; those that time something run alone.

    Returns:
        The outcome of every item in order, those that had passed before included.
    """
    outcomes: dict[str, Outcome] = {}
    waiting, running = list(items), dict[Item, Running]()

    def ended(item: Item, outcome: Outcome) -> None:
        outcomes[item.name] = outcome
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        results.put({"name": item.name, "source": source}, {"date": date, **asdict(outcome)})
        reason = f": {outcome.reason}" if outcome.reason else ""
        say(f"{item.name}: {outcome.verdict} after {outcome.seconds:.0f} s{reason}")

    try:
        while waiting or running:
            for item, process in list(running.items()):
                if outcome := process.outcome():
                    del running[item]
                    ended(item, outcome)
            while waiting and may_start(waiting[0], running, jobs):
                item = waiting.pop(0)
                earlier = results.find(name=item.name, source=source)
                if earlier is not None and earlier["verdict"] == PASSED:
                    outcomes[item.name] = Outcome(
                        PASSED, "", earlier["seconds"], earlier["command"]
                    )
                    say(f"{item.name}: passed on {earlier['date'][:10]}")
                    continue
                if missing := [name for name in item.modules if find_spec(name) is None]:
                    ended(item, Outcome(LEFT_OUT, f"{', '.join(missing)} is not installed"))
                    continue
                say(f"{item.name}: running, at most {item.most_minutes:g} minutes")
                try:
                    running[item] = Running(item, clock, results.path.parent)
                except OutOfTimeError as error:
                    ended(item, Outcome(LEFT_OUT, f"no time: {error}"))
            time.sleep(POLL_SECONDS if running else 0)
    finally:
        for process in running.values():
            process.end()
    return {item.name: outcomes[item.name] for item in items}


def may_start(item: Item, running: Collection[Item], jobs: int) -> bool:
    """Whether an item may run beside those that do."""
    if item.alone or any(other.alone for other in running):
        return not running
    return len(running) < jobs
