"""The server benchmark: what it refuses to report, how it goes on, and all of it at small sizes."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.common import published
from benchmarks.serving import gpu_server as server
from benchmarks.serving import gpu_server_report as server_report
from benchmarks.serving import gpu_server_run as server_run
from benchmarks.serving.sweep import Clock, OutOfTimeError, Range, Results
from vase_vllm.layout.schedule import EvictionSchedule

ROOT = Path(__file__).parents[2]

OPTIONS = Namespace(input_len=100, output_len=1000, waves=2)
SCHEDULE = EvictionSchedule(budget=256, window=64)
# Prompts of 50 to 150 tokens evict at position 320 and every 64 positions until 1048.
LEAST_EVICTIONS = 8 * 12
# 2 of state, 20 of tokens, and a prompt of 150 once more on its way to the prefix cache.
MOST_BLOCKS = 4 * (2 + 20 + 9)


def run(**changes):
    result = {"concurrency": 4, "peak_blocks": MOST_BLOCKS, "blocks_left": 0, "preemptions": 0.0}
    load = {"completed": 8, "total_output_tokens": 8000}
    load |= {key: changes.pop(key) for key in list(changes) if key in load}
    return result | {"load": load} | changes


def check(result, schedule=SCHEDULE, num_evictions=LEAST_EVICTIONS):
    server_run.check_run(result, OPTIONS, schedule, num_evictions, state_blocks=2, block_size=16)


def test_a_right_run_passes():
    check(run())
    check(run(preemptions=30.0))
    check(run(peak_blocks=10_000), schedule=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(completed=7), "7 of 8 requests completed"),
        (dict(total_output_tokens=7999), "answers are cut off"),
        (dict(peak_blocks=0), "no block was seen in use"),
        (dict(blocks_left=3), "3 blocks are in use after"),
        (dict(peak_blocks=MOST_BLOCKS + 1), "125 blocks in use, 124 are the bound"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(changes, message):
    with pytest.raises(server_run.CheckFailedError, match=message):
        check(run(**changes))


@pytest.mark.parametrize("num_evictions", [0, LEAST_EVICTIONS - 1], ids=str)
def test_refuses_too_few_evictions(num_evictions):
    with pytest.raises(
        server_run.CheckFailedError, match=f"{num_evictions} evictions, at least 96"
    ):
        check(run(), num_evictions=num_evictions)


@pytest.mark.parametrize(
    ("line", "is_error"),
    [
        ("(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:1] it broke", True),
        ("Traceback (most recent call last):", True),
        ("INFO 01-02 03:04:05 [core.py:1] on_error=raise", False),
        ("WARNING 01-02 03:04:05 [core.py:1] careful", False),
    ],
    ids=["error", "traceback", "info", "warning"],
)
def test_errors_in_the_log(line, is_error):
    assert bool(server.ERROR.search(f"INFO start\n{line}\n")) == is_error


def test_every_id_of_the_model_is_a_token(tmp_path):
    from transformers import AutoTokenizer

    config = server.write_model(tmp_path, "qwen3-14b", server.TINY)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == config["vocab_size"] == 512
    assert tokenizer.decode([72, 105, 300]) == "Hiw300;"
    assert tokenizer.encode("Hi w300;") == list(b"Hi w300;")


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
    with pytest.raises(ValueError, match="device = a GPU, not another: choose another --out"):
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
    assert 55 < Clock(1, now).left() <= 60
    assert Clock(1, now).left(at_least=30) > 30
    with pytest.raises(OutOfTimeError, match="s are left, 61 s are needed"):
        Clock(1, now).left(at_least=61)
    with pytest.raises(OutOfTimeError, match="0 s are left"):
        Clock(1, now - 100).left()


IN_EFFECT = {"CUDA graphs": "FULL", "async scheduling": "on"}


def report(smoke):
    loads = [{key: float(10 * n) for key in server_report.COLUMNS.values()} for n in (1, 2, 4)]
    counts = dict(peak_blocks=3, pool_blocks=9, in_effect=IN_EFFECT | {"prefix caching": "on"})
    runs = [measured(32, 0.0, load=load, preemptions=n, **counts) for n, load in enumerate(loads)]
    evicting = {"in_effect": IN_EFFECT | {"prefix caching": "off"}}
    runs.append(measured(16, 0.0, **counts) | {"load": loads[0]})
    runs.append(measured(16, 0.0, **counts) | {"load": loads[0], "policy": "vase"} | evicting)
    return {
        "smoke": smoke,
        "device": "a GPU",
        "date": "2026-01-01",
        "versions": {"vllm": "0"},
        "python": "3",
        "command": "python",
        "model": "model",
        "settings": {"input_len": 1, "output_len": 2, "window": 3},
        "runs": runs,
        "ends": {"full cache": "memory was full"},
    }


def test_medians_over_the_rounds(tmp_path):
    first, second, _ = server_report.cells(report(smoke=False))
    assert (first["concurrency"], second["concurrency"]) == (16, 32)
    assert (second["output tokens/s"], second["range"], second["rounds"]) == (20.0, (10.0, 40.0), 3)
    assert (second["preemptions"], second["peak_running"]) == (2, 32)
    path = server_report.results_path(tmp_path, report(smoke=False))
    assert path.name == "server-a-gpu-model-2.json"
    server_report.write(path, report(smoke=False))
    text = path.with_suffix(".md").read_text()
    assert "| full cache | 32 | 20 (10 to 40) | 20 | 20 | 20 | 2 | 32 | 3 of 9 | 3 | meas" in text
    assert "- async scheduling: on\n" in text
    assert "- prefix caching: on (full cache), off (vase)\n" in text
    assert "- full cache: the sweep ended, memory was full." in text
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_published_numbers_are_in_the_table_and_marked():
    lines = server_report.markdown(report(smoke=False)).splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| cache |")))
    table = lines[start : lines.index("", start)]
    assert len({row.count("|") for row in table}) == 1
    assert sum("measured here" in row for row in table) == 3
    marked = [row for row in table if published.MARK in row]
    assert len(marked) == len(published.load()) == len(table) - 2 - 3


def test_a_smoke_run_has_no_numbers():
    text = server_report.markdown(report(smoke=True))
    assert "| full cache | 16 | - | - | - | - | - | - | - | - | measured here |" in text
    assert "no numbers" in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dry_run_sweeps_and_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/serving/gpu_server.py"), "--smoke"]
    command += ["--out", str(tmp_path)]

    def call(minutes=9):
        # The limit is the benchmark's own: killed, it would leave its server behind.
        limited = [*command, "--minutes", str(minutes)]
        done = subprocess.run(limited, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    assert "all runs are there" in call()
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    swept = [(run["policy"], run["concurrency"]) for run in content["runs"]]
    # The full cache's memory is full at 4, a budget's is not; how fast it is, is a CPU's matter.
    assert swept == [
        ("full cache", 2),
        ("full cache", 4),
        ("vase, budget 64", 2),
        ("vase, budget 64", 4),
    ]
    assert content["ends"]["full cache"] == "memory was full"
    assert content["ends"]["vase, budget 64"] != "memory was full"
    assert all(run["evictions"] > 0 for run in content["runs"][2:])
    states = [run["in_effect"]["prefix caching"] for run in content["runs"]]
    assert states == ["on"] * 4

    # As if the call had been stopped before its last run.
    stopped = content | {"runs": content["runs"][:-1], "ends": {}}
    path.write_text(json.dumps(stopped))
    assert "out of time at vase, budget 64" in call(minutes=0.05)
    assert json.loads(path.read_text())["runs"] == stopped["runs"]
    output = call()
    assert output.count("checks passed") == 1
    assert "vase, budget 64" in output[: output.index("checks passed")]
    again = json.loads(path.read_text())["runs"]
    assert again[:-1] == stopped["runs"]
    assert [(run["policy"], run["concurrency"]) for run in again] == swept
