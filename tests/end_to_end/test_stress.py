"""Requests of all kinds at once; a server that is killed under load, and its successor."""

import os
import signal
import threading

import pytest

from benchmarks.stress import run as stress
from benchmarks.stress.client import Outcome, make_cases, press
from vase_vllm.tools.server import Server
from vase_vllm.tools.tiny_model import make_tiny_model

GOOD = {
    "date": "2026-01-01",
    "machine": {"processor": "p", "cores": 2},
    "command": "c",
    "seconds": 60.0,
    "concurrency": 4,
    "counters": dict.fromkeys(stress.COUNTERS, 5),
    "blocks_left": 0,
    "processes_left": 0,
    "errors_in_the_log": [],
    "kinds": {"short": {"sent": 3, "seconds": [1.0, 2.0, 3.0]}},
}


def test_a_good_run_is_told_as_that():
    assert stress.is_good(GOOD)
    assert "3 requests in 1.0 minutes, 4 at a time: **nothing lost" in stress.page(GOOD)


@pytest.mark.parametrize(
    "bad",
    [
        {"blocks_left": 1},
        {"processes_left": 1},
        {"errors_in_the_log": ["ERROR"]},
        {"counters": dict.fromkeys(stress.COUNTERS, 0)},
        *({"kinds": {"short": {name: 1}}} for name in ("wrong_status", "different", "unanswered")),
    ],
    ids=str,
)
def test_what_went_wrong_is_told(bad):
    assert not stress.is_good(GOOD | bad)
    assert "NOT as it must be" in stress.page(GOOD | bad)


@pytest.mark.slow
def test_nothing_is_lost_and_a_killed_server_has_a_successor(tmp_path):
    model = make_tiny_model(tmp_path / "model", layers=2, dtype="float32")
    arguments = [*stress.ARGUMENTS, "--kv-cache-memory-bytes", stress.parse_arguments([]).pool]
    with Server(model, arguments) as first:
        first.wait_until_ready()
        cases = make_cases(first, per_kind=1, seed=1)
        args = stress.parse_arguments(["--minutes", "0", "--requests", "100"])
        with stress.progress_bar() as progress:
            result = stress.measure(first, cases, args, progress)
        assert stress.is_good(result | {"processes_left": 0}), stress.page(
            result | {"processes_left": 0}
        )

        outcomes: dict[str, Outcome] = {}

        def load():
            outcomes.update(press(first, cases, 12, 2, lambda sent: sent < 60))

        clients = threading.Thread(target=load)
        clients.start()
        while not first.num_used_blocks():
            pass
        os.killpg(os.getpgid(first.processes()[0].pid), signal.SIGKILL)
        # Whoever waits is told, and nobody waits for ever.
        clients.join(timeout=60)
        assert not clients.is_alive()
    assert first.processes() == []
    assert sum(outcome.unanswered for outcome in outcomes.values()) > 0
    # Its worker is in the engine's process, which saves one that would import vLLM.
    with Server(model, [*arguments, "--distributed-executor-backend", "uni"]) as second:
        second.wait_until_ready()
        again = press(second, cases, 12, 3, lambda sent: sent < 20)
    assert sum(outcome.failed for outcome in again.values()) == 0
