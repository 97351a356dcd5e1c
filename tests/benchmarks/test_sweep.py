"""A sweep over concurrency: when it ends, how it is gone on with, and all of it on a tiny model."""

import json
import runpy
import sys
import time

import pytest

from benchmarks.common.clock import Clock, OutOfTimeError
from benchmarks.serving.sweep import Range, Results

SWEEP = Range(first=16, most=100)


def measured(concurrency, speed, preemptions=0, peak_running=None, **more):
    return {
        "policy": "full cache",
        "round": 1,
        "concurrency": concurrency,
        "preemptions": preemptions,
        "peak_running": peak_running or concurrency,
        "load": {"output_throughput": speed},
    } | more


@pytest.mark.parametrize(
    ("runs", "following", "reason"),
    [
        ([], 16, ""),
        ([measured(16, 10.0)], 32, ""),
        ([measured(16, 10.0), measured(32, 10.6)], 64, ""),
        ([measured(16, 10.0), measured(32, 10.4)], None, "throughput grew by less than 5%"),
        ([measured(16, 10.0, preemptions=1)], None, "memory was full"),
        ([measured(16, 10.0, peak_running=15)], None, "memory was full"),
        ([measured(64, 10.0)], None, "--max-concurrency"),
    ],
    ids=["first", "doubles", "grows", "no-gain", "preempts", "waits", "most"],
)
def test_a_sweep_ends(runs, following, reason):
    assert SWEEP.after(runs) == (following, reason)


def test_a_workload_of_one_concurrency_is_one_run():
    alone = Range(first=16, most=16)
    assert alone.after([]) == (16, "")
    assert alone.after([{"status": "failed", "reason": "it crashed"}]) == (None, "")


def test_results_that_are_not_gone_on_with_are_written_anew(tmp_path):
    path = tmp_path / "results.json"
    Results(path, {"device": "a GPU"}).add(measured(16, 10.0))
    anew = Results(path, {"device": "another"}, go_on=False)
    assert anew.content["runs"] == []
    assert len(json.loads(path.read_text())["runs"]) == 1


def test_results_are_gone_on_with(tmp_path):
    path, clock = tmp_path / "there" / "results.json", Clock(None, 0.0)
    results = Results(path, {"device": "a GPU", "settings": {"budgets": (1, 2)}})
    results.add(measured(16, 10.0))
    results.add(measured(32, 10.0, policy="vase"))
    again = Results(path, {"device": "a GPU", "settings": {"budgets": (1, 2)}})
    assert again.next("full cache", 1, SWEEP, clock) == 32
    assert again.next("full cache", 2, SWEEP, clock) == 16
    again.add(measured(32, 20.0, preemptions=3))
    assert again.next("full cache", 1, SWEEP, clock) is None
    assert again.content["ends"] == {"full cache": "memory was full"}
    assert [item.name for item in path.parent.iterdir()] == ["results.json"]
    with pytest.raises(ValueError, match="device = a GPU, not another: choose another --output"):
        Results(path, {"device": "another", "settings": {"budgets": (1, 2)}})


def test_a_run_that_is_cut_off_twice_is_not_tried_again(tmp_path):
    results = Results(tmp_path / "results.json", {})
    short, long, endless = Clock(9, 0.0), Clock(30, 0.0), Clock(None, 0.0)
    for seconds in (20.0, 500.0):
        assert results.next("full cache", 1, SWEEP, short) == 16
        results.cut("full cache", 16, short, seconds)
    assert results.next("vase", 1, SWEEP, short) == 16
    assert results.next("full cache", 1, SWEEP, short) is None
    assert results.content["ends"] == {"full cache": "16 did not end within 500 s"}
    # With more time it is worth another try.
    assert results.next("full cache", 1, SWEEP, long) == 16
    assert results.next("full cache", 1, SWEEP, endless) == 16
    assert not results.content["ends"]


def test_clock():
    assert Clock(None, 0.0).left(at_least=1e9) is None
    now = time.monotonic()
    assert 3000 < Clock(100, now).left() <= 6000
    assert Clock(100, now).left(at_least=3000) > 3000
    with pytest.raises(OutOfTimeError, match="s are left, 61 s are needed"):
        Clock(1, now).left(at_least=61)
    with pytest.raises(OutOfTimeError, match="0 s are left"):
        Clock(1, now - 100).left()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_dry_run_sweeps_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    def call(*arguments):
        command = ["run", "--suite", "smoke", "--output", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        # As `python -m` does it, but in this process, which has imported vLLM.
        with pytest.raises(SystemExit) as end:
            runpy.run_module("benchmarks.serving.run", run_name="__main__")
        output = capsys.readouterr().out
        assert end.value.code == 0, output[-3000:]
        return output

    output = call("--policies", "full")
    assert output.count("checks passed") == 2
    (path,) = tmp_path.glob("*.json")
    begun = json.loads(path.read_text())["runs"]

    # It goes on where it stopped: the other policy has still to be run.
    output = call()
    assert "all runs are there" in output
    assert output.count("checks passed") == 2
    content = json.loads(path.read_text())
    assert content["runs"][:2] == begun
    swept = [(run["policy"], run["concurrency"]) for run in content["runs"]]
    # The full cache's memory is full at 4, a budget's is not; how fast it is, is a CPU's matter.
    evicting = "vase-64-window-16"
    assert swept == [("full", 2), ("full", 4), (evicting, 2), (evicting, 4)]
    assert content["ends"]["full"] == "memory was full"
    assert content["ends"][evicting] != "memory was full"
    assert all(run["evictions"] > 0 for run in content["runs"][2:])
    states = [run["server"]["prefix_caching"] for run in content["runs"]]
    assert states == ["True"] * 4
    assert "no numbers" in (tmp_path / "smoke.md").read_text()
