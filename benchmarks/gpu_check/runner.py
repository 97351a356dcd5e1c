"""Runs one item after the other, each in a process of its own, and says what came of it."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common.clock import Clock, OutOfTimeError
from benchmarks.common.exit_codes import SKIPPED
from benchmarks.common.paths import ROOT
from benchmarks.common.results import Rows
from benchmarks.gpu_check.items import Item

PASSED, FAILED, LEFT_OUT = "passed", "failed", "skipped"
GRACE_SECONDS = 45
"""What an item that is told to end has for it: a server of its own gets 30 s, see ``Server``."""
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


def run_item(item: Item, clock: Clock, output: Path) -> Outcome:
    """Run an item, its output to a log in ``output``; it has ended when this returns.

    Raises:
        OutOfTimeError: there is too little time for it.
    """
    if missing := [name for name in item.modules if find_spec(name) is None]:
        return Outcome(LEFT_OUT, f"{', '.join(missing)} is not installed")
    least = 60 * item.least_minutes + GRACE_SECONDS
    left = clock.left(least)
    seconds = 60 * item.most_minutes
    if left is not None:
        seconds = min(seconds, left - GRACE_SECONDS)
    own_clock = max(seconds - SIGN_OFF_SECONDS, seconds / 2)
    command = item.command(own_clock / 60, output)
    log = output / "logs" / f"{item.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        in_time = _wait(process, seconds)
    spent = round(time.monotonic() - begin, 1)
    if not in_time:
        return Outcome(FAILED, f"not done after {seconds:.0f} s", spent, shlex.join(command))
    verdict = {0: PASSED, SKIPPED: LEFT_OUT}.get(process.returncode, FAILED)
    reason = "" if verdict == PASSED else reason_of(log.read_text(errors="replace"), verdict)
    return Outcome(verdict, reason, spent, shlex.join(command))


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ends in time; else, and on Ctrl-C, it is told to, and its group killed."""
    in_time = True
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        in_time = False
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        # Nothing that it has left behind may hold the GPU.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return in_time


def run_all(
    items: Sequence[Item],
    results: Rows,
    clock: Clock,
    source: str,
    say: Callable[[str], None] = print,
) -> dict[str, Outcome]:
    """Run the items that have not passed yet, and write every outcome.

    Args:
        source: digest of the sources: what has passed with others is run again.

    Returns:
        The outcome of every item, those that had passed before included.
    """
    outcomes = {}
    for item in items:
        key: dict[str, Any] = {"name": item.name, "source": source}
        earlier = results.find(**key)
        if earlier is not None and earlier["verdict"] == PASSED:
            outcomes[item.name] = Outcome(PASSED, "", earlier["seconds"], earlier["command"])
            say(f"{item.name}: passed on {earlier['date'][:10]}")
            continue
        say(f"{item.name}: running, at most {item.most_minutes:g} minutes")
        try:
            outcome = run_item(item, clock, results.path.parent)
        except OutOfTimeError as error:
            outcome = Outcome(LEFT_OUT, f"no time: {error}")
        outcomes[item.name] = outcome
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        results.put(key, {"date": date, **asdict(outcome)})
        reason = f": {outcome.reason}" if outcome.reason else ""
        say(f"{item.name}: {outcome.verdict} after {outcome.seconds:.0f} s{reason}")
    return outcomes
