"""Two servers that take turns: whose turn it is, and what is said of the ratios."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from rich.progress import Progress

from benchmarks.common.policy import Policy
from benchmarks.common.results import ResultsFile
from benchmarks.common.workload import Workload
from benchmarks.serving import paired, paired_report
from benchmarks.serving.suites import SUITES

SUITE = SUITES["cpu"]
WORKLOAD = SUITE.workloads[0]
POLICIES = [policy for policy in SUITE.policies if policy.name in ("full", "vase-512")]


@dataclass(frozen=True)
class Warm:
    """What a turn needs of a server."""

    policy: Policy
    workload: Workload
    measure: Callable[..., dict[str, Any]] | None


def test_turns_alternate_and_every_pair_has_requests_of_its_own(monkeypatch, tmp_path):
    turns, running = [], set()

    @contextmanager
    def service(suite, workload, policy, *_):
        def measure(concurrency, timeout, watch, seed):
            assert running == {"full", "vase-512"}
            turns.append((policy.name, seed, concurrency))
            load = {"output_throughput": 100.0 + len(turns), "median_itl_ms": 5.0}
            return {"status": "ok", "load": load, "preemptions": 0.0, "peak_running": 32.0}

        running.add(policy.name)
        yield Warm(policy, WORKLOAD, measure)
        running.remove(policy.name)

    monkeypatch.setattr(paired, "service", service)
    monkeypatch.setattr(paired, "prepare_model", lambda *_: [])
    results = ResultsFile(tmp_path / "results.json", {}, {"pairs": []})
    with paired.pair_of_servers(SUITE, WORKLOAD, POLICIES) as servers, Progress() as progress:
        paired.take_turns(servers, replace(WORKLOAD, rounds=2), 1, results, progress)
    assert turns == [("full", 1, 32), ("vase-512", 1, 32), ("vase-512", 2, 32), ("full", 2, 32)]
    pairs = ResultsFile(tmp_path / "results.json", {}, {"pairs": []}).content["pairs"]
    speeds = [{name: turn["tokens_per_second"] for name, turn in pair.items()} for pair in pairs]
    assert speeds == [{"full": 101.0, "vase-512": 102.0}, {"vase-512": 103.0, "full": 104.0}]
    assert not running


def test_a_server_that_does_not_start_takes_the_other_one_with_it(monkeypatch):
    running = set()

    @contextmanager
    def service(suite, workload, policy, *_):
        if policy.name == "full":
            raise RuntimeError("vllm serve failed")
        running.add(policy.name)
        yield Warm(policy, WORKLOAD, None)
        running.remove(policy.name)

    monkeypatch.setattr(paired, "service", service)
    monkeypatch.setattr(paired, "prepare_model", lambda *_: [])
    with (
        pytest.raises(RuntimeError, match="vllm serve failed"),
        paired.pair_of_servers(SUITE, WORKLOAD, POLICIES),
    ):
        pytest.fail("one of the servers does not run")
    assert not running


def test_workloads_that_share_servers_share_their_memory(capsys, monkeypatch):
    monkeypatch.setattr(paired.current_platform, "is_cuda", lambda: True)
    args = paired.parse_arguments(["--suite", "pair-qwen3-8b", "--policy", "vase-1024"])
    assert [(each.name, each.rounds) for each in paired.chosen_workloads(args)] == [
        ("relaxed-gpu", 8),
        ("pressure-gpu", 1),
    ]
    monkeypatch.undo()
    args = paired.parse_arguments(["--workloads", "relaxed", "--pairs", "3", "--waves", "2"])
    (relaxed,) = paired.chosen_workloads(args)
    assert (relaxed.rounds, relaxed.num_requests) == (3, 2 * relaxed.concurrency)
    for arguments, message in (
        (["--workloads", "relaxed", "chat"], "differ in KV memory or longest sequence"),
        (
            ["--workloads", "relaxed", "--policy", "vase-3"],
            "--policy: vase-3 is none of full, vase-256",
        ),
        (["--suite", "pair-qwen3-8b", "--policy", "vase-1024"], "no GPU"),
    ):
        with pytest.raises(SystemExit):
            paired.parse_arguments(arguments)
        assert message in capsys.readouterr().err


def test_a_turn_that_is_not_what_it_must_be_has_no_speed():
    run = {"status": "wrong", "reason": "3 blocks are left"}
    warm = Warm(POLICIES[0], WORKLOAD, lambda *_: run)
    with pytest.raises(ValueError, match="full: 3 blocks are left"):
        paired.turn(warm, 1)


def test_the_page_tells_the_ratio_of_pairs_not_of_medians(tmp_path):
    """The machine gets slower by half in the middle; the policy is at 0.9 in every pair."""
    speeds = [100.0] * 6 + [50.0] * 6
    parts = {"full": 1.0, "vase-512": 0.9}
    others = {"median_itl_ms": 8.0, "preemptions": 3.0}
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
        "pairs": [
            {name: others | {"tokens_per_second": part * speed} for name, part in parts.items()}
            for speed in speeds
        ],
    }
    text = paired_report.page([result])
    ratio = "0.900 (0.900 to 0.900)"
    cells = f"| relaxed | vase-512 | float32 | 12 | 75 | 68 | 8.0, 8.0 | 3, 3 | {ratio} | {ratio} |"
    assert cells in text
    alone = result | {"model": "qwen3-8b", "pairs": result["pairs"][:1]}
    text = paired_report.page([alone])
    assert "- model: the shape of qwen3-8b; dummy weights\n" in text
    assert "| 1 | 100 | 90 | 8.0, 8.0 | 3, 3 | 0.900 | one pair |" in text
    paired_report.plot([result], tmp_path / "paired")
    assert (tmp_path / "paired.svg").stat().st_size > 1000


def test_half_a_pair_is_kept_and_has_no_ratio(tmp_path):
    load = {"output_throughput": 100.0, "median_itl_ms": 5.0}
    run = {"status": "ok", "load": load, "preemptions": 0.0, "peak_running": 32.0}
    wrong = {"status": "wrong", "reason": "3 blocks are left"}
    servers = [
        Warm(policy, WORKLOAD, lambda *_, outcome=outcome: outcome)
        for policy, outcome in zip(POLICIES, (run, wrong), strict=True)
    ]
    results = ResultsFile(tmp_path / "a.json", {"policy": "vase-512"}, {"pairs": []})
    with pytest.raises(ValueError, match="vase-512: 3 blocks are left"), Progress() as progress:
        paired.take_turns(servers, WORKLOAD, 1, results, progress)
    (pair,) = json.loads((tmp_path / "a.json").read_text())["pairs"]
    assert list(pair) == ["full"]
    assert "no pair of turns is complete" in paired_report.write(tmp_path)
