"""The rounds of a workload, with servers that are not there: order, failures, time, going on."""

import json
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from benchmarks.common.clock import Clock, OutOfTimeError
from benchmarks.common.exit_codes import OUT_OF_TIME
from benchmarks.common.load import RunFailedError, RunTimeoutError
from benchmarks.serving import benchmark
from benchmarks.serving.benchmark import Benchmark, CheckFailedError
from benchmarks.serving.run import parse_arguments, run_suite
from benchmarks.serving.suites import SUITES


class Servers:
    """Stand-ins for :func:`benchmarks.serving.measure.service`.

    Attributes:
        outcomes: by policy and concurrency: a run's changes, or what is raised.
        asked: the policies and concurrencies that were run, in order.
    """

    def __init__(self):
        self.outcomes, self.asked = {}, []

    @contextmanager
    def service(self, suite, workload, policy, *_):
        if error := self.outcomes.get(policy.name):
            raise error

        def measure(concurrency, timeout, watch):
            self.asked.append((policy.name, concurrency))
            outcome = self.outcomes.get((policy.name, concurrency), {})
            if isinstance(outcome, Exception):
                raise outcome
            run = {"status": "ok", "seconds": 1.0, "preemptions": 0, "peak_running": concurrency}
            return run | {"load": {"output_throughput": 10.0 * concurrency}} | outcome

        yield SimpleNamespace(measure=measure, arguments=["--one"], settings={"device": "cpu"})


@pytest.fixture
def servers(monkeypatch):
    stand_in = Servers()
    monkeypatch.setattr(benchmark, "service", stand_in.service)
    monkeypatch.setattr(benchmark, "prepare_model", lambda *_: [])
    source = {"machine": {}, "versions": {}, "date": "2026-01-01", "command": "python"}
    monkeypatch.setattr(benchmark, "provenance", lambda: dict(source))
    return stand_in


def make(tmp_path, suite, *arguments, clock=None):
    args = parse_arguments(["--suite", suite, "--output", str(tmp_path), *arguments])
    workload = SUITES[suite].workloads[0]
    policies = SUITES[suite].policies[:2]
    clock = clock or Clock(None, 0.0)
    return Benchmark(suite, SUITES[suite], workload, policies, args, clock)


def stored(tmp_path):
    (path,) = tmp_path.glob("*.json")
    return json.loads(path.read_text())


def test_every_other_round_goes_in_reverse_order(tmp_path, servers):
    assert make(tmp_path, "cpu", "--rounds", "3").run()
    order = [name for name, _ in servers.asked]
    assert order == ["full", "vase-256", "vase-256", "full", "full", "vase-256"]
    content = stored(tmp_path)
    assert [run["round"] for run in content["runs"]] == [1, 1, 2, 2, 3, 3]
    assert content["workload"]["rounds"] == 3
    assert content["ends"] == {}
    assert make(tmp_path, "cpu", "--rounds", "1", "--append", "--note", "more").run()
    assert [run["round"] for run in stored(tmp_path)["runs"]][-2:] == [4, 4]
    assert (stored(tmp_path)["workload"]["rounds"], stored(tmp_path)["notes"]) == (4, ["more"])
    assert make(tmp_path, "cpu", "--rounds", "1").run()
    assert len(stored(tmp_path)["runs"]) == 2


@pytest.mark.parametrize(
    ("key", "outcome", "status"),
    [
        ("full", RuntimeError("vllm serve failed"), "failed"),
        (("full", 32), RunFailedError("vllm bench serve failed"), "failed"),
        (("full", 32), RunTimeoutError("not done after 9 s"), "failed"),
        (("full", 32), {"status": "wrong", "reason": "3 evictions, 4 expected"}, "wrong"),
    ],
    ids=["start", "load", "timeout", "check"],
)
def test_a_run_that_does_not_count_is_recorded_and_the_others_go_on(
    tmp_path, servers, key, outcome, status
):
    servers.outcomes[key] = outcome
    assert not make(tmp_path, "cpu", "--rounds", "1").run()
    full, vase = stored(tmp_path)["runs"]
    assert (full["status"], vase["status"]) == (status, "ok")
    assert full["reason"]


@pytest.mark.parametrize(
    "outcome",
    [RunFailedError("it broke"), {"status": "wrong", "reason": "it broke"}],
    ids=["failed", "wrong"],
)
def test_the_first_run_of_a_sweep_that_does_not_count_ends_the_call(tmp_path, servers, outcome):
    key = "vase-64-window-16", 2
    servers.outcomes[key] = outcome
    with pytest.raises(CheckFailedError, match="vase-64-window-16, concurrency 2: it broke"):
        make(tmp_path, "smoke").run()
    assert [run["policy"] for run in stored(tmp_path)["runs"]] == ["full", "full"]
    del servers.outcomes[key]
    servers.asked.clear()
    assert make(tmp_path, "smoke").run()
    assert servers.asked == [("vase-64-window-16", 2), ("vase-64-window-16", 4)]
    assert stored(tmp_path)["ends"]["vase-64-window-16"] == "--max-concurrency"


def test_a_sweep_is_cut_off_in_time_and_goes_on(tmp_path, servers):
    servers.outcomes["full", 4] = RunTimeoutError("not done")
    soon = Clock(100, time.monotonic())
    with pytest.raises(OutOfTimeError, match="stopped after"):
        make(tmp_path, "smoke", clock=soon).run()
    content = stored(tmp_path)
    assert [run["concurrency"] for run in content["runs"]] == [2]
    assert [(cut["policy"], cut["concurrency"]) for cut in content["cuts"]] == [("full", 4)]
    servers.asked.clear()
    with pytest.raises(OutOfTimeError, match="0 s are left"):
        make(tmp_path, "smoke", clock=Clock(0, time.monotonic() - 1)).run()
    assert servers.asked == []
    servers.outcomes.clear()
    assert make(tmp_path, "smoke").run()
    assert servers.asked[0] == ("full", 4)


def test_a_call_without_time_says_that_the_same_command_goes_on(tmp_path, servers):
    assert make(tmp_path, "smoke").run()
    stopped = stored(tmp_path)
    # As if the call had been stopped before its last run.
    stopped |= {"runs": stopped["runs"][:-1], "ends": {}}
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps(stopped))
    servers.asked.clear()
    args = parse_arguments(["--suite", "smoke", "--output", str(tmp_path)])
    code, state = run_suite(SUITES["smoke"], args, Clock(0, time.monotonic() - 1))
    assert code == OUT_OF_TIME
    assert state == "OUT OF TIME (0 s are left): the same command goes on"
    assert stored(tmp_path)["runs"] == stopped["runs"]
    assert servers.asked == []
    assert run_suite(SUITES["smoke"], args, Clock(None, 0.0)) == (0, "all runs are there")
    assert servers.asked == [("vase-64-window-16", 4)]
    assert stored(tmp_path)["runs"][:-1] == stopped["runs"]


def test_a_server_that_the_end_of_the_time_breaks_off_has_not_failed(tmp_path, servers):
    servers.outcomes["full"] = RuntimeError("vllm serve failed (too slow)")
    # Less than the second that another try would need is left.
    with pytest.raises(OutOfTimeError):
        make(tmp_path, "smoke", clock=Clock(0.01, time.monotonic())).run()


def test_a_sweep_of_another_machine_is_refused(tmp_path, servers):
    assert make(tmp_path, "smoke").run()
    content = stored(tmp_path) | {"machine": {"accelerator": "another"}}
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="choose another --output"):
        make(tmp_path, "smoke")
