"""Two servers that take turns: whose turn it is, and what is said of the ratios."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from benchmarks.common.results import ResultsFile
from benchmarks.serving import paired
from benchmarks.serving.suites import SUITES

SUITE = SUITES["cpu"]
WORKLOAD = SUITE.workloads[0]
POLICIES = [policy for policy in SUITE.policies if policy.name in ("full", "vase-512")]


def test_turns_alternate_and_every_pair_has_requests_of_its_own(monkeypatch, tmp_path):
    turns, running = [], set()

    @contextmanager
    def service(suite, workload, policy, *_):
        def measure(concurrency, timeout, watch, seed):
            assert running == {"full", "vase-512"}
            turns.append((policy.name, seed, concurrency))
            return {"status": "ok", "load": {"output_throughput": 100.0 + len(turns)}}

        running.add(policy.name)
        yield SimpleNamespace(policy=policy, workload=workload, measure=measure)
        running.remove(policy.name)

    monkeypatch.setattr(paired, "service", service)
    results = ResultsFile(tmp_path / "results.json", {}, {"pairs": []})
    paired.run_pairs(SUITE, WORKLOAD, POLICIES, 2, results)
    assert turns == [("full", 1, 32), ("vase-512", 1, 32), ("vase-512", 2, 32), ("full", 2, 32)]
    again = ResultsFile(tmp_path / "results.json", {}, {"pairs": []})
    assert again.content["pairs"] == [
        {"full": 101.0, "vase-512": 102.0},
        {"vase-512": 103.0, "full": 104.0},
    ]
    assert not running


def test_a_turn_that_is_not_what_it_must_be_has_no_speed():
    run = {"status": "wrong", "reason": "3 blocks are left"}
    warm = SimpleNamespace(policy=POLICIES[0], workload=WORKLOAD, measure=lambda *_: run)
    with pytest.raises(ValueError, match="full: 3 blocks are left"):
        paired.turn(warm, 1)


def test_the_page_tells_the_ratio_of_pairs_not_of_medians(tmp_path):
    """The machine gets slower by half in the middle; the policy is at 0.9 in every pair."""
    speeds = [100.0] * 6 + [50.0] * 6
    result = {
        "workload": {
            "name": "relaxed",
            "question": "a question",
            "num_requests": 16,
            "concurrency": 16,
            "output_len": 256,
        },
        "policy": "vase-512",
        "dtype": "float32",
        "model": {"layers": 2},
        "machine": {"processor": "P", "cores": 2, "accelerator": None},
        "versions": {"vllm": "0.32.0"},
        "date": "2026-11-27T00:00:00",
        "command": "c",
        "pairs": [{"full": speed, "vase-512": 0.9 * speed} for speed in speeds],
    }
    text = paired.page([result])
    cells = "relaxed | vase-512 | float32 | 12 | 75 | 68 | 0.900 (0.900 to 0.900) | 0.900 (0.9"
    assert f"| {cells}00 to 0.900) |" in text
    paired.plot([result], tmp_path / "paired")
    assert (tmp_path / "paired.svg").stat().st_size > 1000
