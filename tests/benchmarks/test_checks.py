"""The checks of a run, one set for all benchmarks: what is refused, and with which words."""

import pytest

from benchmarks.common import checks
from benchmarks.common.policy import Policy
from benchmarks.common.server import ERROR

POLICY = Policy("vase", 256)
LENGTHS = ([60, 100, 140, 150], [1000] * 4)
# Positions up to 1058 to 1148 evict at position 320 and every 64 positions after it.
EVICTIONS = 12 + 13 + 13 + 13
# 2 of state, 20 of tokens, and a prompt of 150 once more on its way to the prefix cache.
BOUND = 2 + 20 + 9
SERIES = {"blocks": [0.0, 4.0 * BOUND], "running": [0.0, 4.0], "preemptions": [0.0, 0.0]}


def check(policy=POLICY, must_evict=True, load=None, series=None, **changes):
    inputs, outputs = LENGTHS
    found = {"completed": 4, "input_lens": inputs, "output_lens": outputs} | (load or {})
    observed = {
        "requested": outputs,
        "stops": (),
        "evictions": EVICTIONS,
        "blocks_left": 0,
        "log": "INFO start\n",
    }
    run = checks.Observed(load=found, series=SERIES | (series or {}), **observed | changes)
    return checks.problems(run, policy, block_size=16, group_size=1, must_evict=must_evict)


def test_a_right_run_passes():
    assert check() == []
    assert check(Policy("full"), evictions=None, series={"blocks": [10_000.0, 0.0]}) == []


def test_a_preempted_request_recomputes_its_output_and_evicts_again():
    preempted = {"preemptions": [0.0, 30.0]}
    assert check(series=preempted) == []
    assert check(series=preempted, evictions=EVICTIONS + 5) == []
    assert check(evictions=EVICTIONS + 5) == [f"{EVICTIONS + 5} evictions, {EVICTIONS} expected"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(load={"completed": 3}), "3 of 4 requests completed"),
        (
            dict(load={"output_lens": [1000, 999, 1000, 1000]}),
            "1 outputs are not as long as asked for",
        ),
        (dict(series={"blocks": [0.0, 0.0]}), "no block was seen in use: raise --output-len"),
        (dict(blocks_left=3), "3 blocks were not given back"),
        (
            dict(series={"blocks": [0.0, 4.0 * BOUND + 1]}),
            "125 blocks held, more than 31 for each running request",
        ),
        (dict(log="ERROR it broke\n"), "the server logged an error: ERROR it broke"),
        (dict(evictions=EVICTIONS - 1), f"{EVICTIONS - 1} evictions, {EVICTIONS} expected"),
        (dict(evictions=None), f"None evictions, {EVICTIONS} expected"),
        (
            dict(policy=Policy("full"), evictions=0),
            "the full cache's server counts evictions",
        ),
    ],
    ids=[
        *("completed", "cut-off", "no-block", "left", "bound"),
        *("error", "too-few", "no-count", "full-cache"),
    ],
)
def test_refuses(changes, message):
    assert check(**changes) == [message]


def test_requests_that_opt_out_evict_nothing_and_hold_their_whole_length():
    two = dict(num_opted_out=2, evictions=12 + 13)
    assert check(**two) == []
    assert check(num_opted_out=2) == [f"{EVICTIONS} evictions, 25 expected"]
    longest = -(-(150 + 1000) // 16)
    assert check(**two, series={"blocks": [0.0, 4.0 * longest]}) == []
    assert check(**two, series={"blocks": [0.0, 4.0 * longest + 1]}) == [
        f"{4 * longest + 1} blocks held, more than {longest} for each running request"
    ]


def test_a_sweep_must_evict():
    short = {"input_lens": [100] * 4, "output_lens": [100] * 4}
    blocks = {"blocks": [0.0, 50.0]}
    run = dict(load=short, requested=[100] * 4, evictions=0, series=blocks)
    assert check(must_evict=False, **run) == []
    assert check(**run) == ["nothing was evicted: raise --output-len"]
    assert f"0 evictions, {EVICTIONS} expected" in check(evictions=0)


@pytest.mark.parametrize(
    ("lengths", "complaint"),
    [([1, 700, 1000], []), ([1, 1001], ["longer"]), ([0, 1000], ["empty"])],
    ids=["right", "longer", "empty"],
)
def test_outputs_that_the_model_ends_itself(lengths, complaint):
    load = {"completed": len(lengths), "output_lens": lengths}
    found = checks.load_problems(load, [1000] * len(lengths), stops=(65,))
    assert len(found) == len(complaint)
    assert all(word in message for word, message in zip(complaint, found, strict=True))


@pytest.mark.parametrize(
    ("line", "is_error"),
    [
        ("(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:1] it broke", True),
        ("Traceback (most recent call last):", True),
        ("INFO 01-02 03:04:05 [core.py:1] on_error=raise", False),
        ("WARNING 01-02 03:04:05 [core.py:1] careful", False),
        ("(EngineCore pid=7) WARNING 01-02 03:04:05 [i.py:1] Traceback (most recent call", False),
    ],
    ids=["error", "traceback", "info", "warning", "traceback of an optional module"],
)
def test_errors_in_the_log(line, is_error):
    assert bool(ERROR.search(f"INFO start\n{line}\n")) == is_error


ON = {
    "device": "cuda",
    "enforce_eager": "False",
    "cuda_graphs": "FULL_AND_PIECEWISE",
    "async_scheduling": "True",
}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"cuda_graphs": "NONE"}, "CUDA graphs are NONE, async_scheduling is True"),
        ({"enforce_eager": "True"}, "CUDA graphs are FULL_AND_PIECEWISE, async_scheduling is True"),
        (
            {"async_scheduling": "False"},
            "CUDA graphs are FULL_AND_PIECEWISE, async_scheduling is False",
        ),
        ({"device": "cpu", "cuda_graphs": "NONE", "async_scheduling": "False"}, None),
    ],
    ids=["on", "no-graphs", "eager", "not-async", "cpu"],
)
def test_a_gpu_without_graphs_or_async_scheduling_is_refused(changes, complaint):
    assert checks.settings_problems(ON | changes) == ([complaint] if complaint else [])
