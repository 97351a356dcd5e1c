"""CUDA graphs of whole engines: vLLM captures and replays them on our tensors, on a CPU.

What a graph holds is recorded (``tests/support/cuda_graphs.py``), so that a replay sees what the
kernels were handed at the capture and nothing newer. Prompts are piecewise graphs, decodes full
ones, in which there are rows of padding.
"""

import pytest

from tests.support.replayed import FAULTS, LENGTHS, ONE_PROMPT, run_replayed

pytestmark = pytest.mark.slow

EVICTION = {"row_statistics", "candidate_scores", "select_and_move"}
KERNELS = EVICTION | {"remap_sequences", "store_ring"}


@pytest.fixture(scope="module")
def report(models):
    return run_replayed(models.qwen3(vocab_size=1024))


def test_tokens_are_those_without_graphs(report):
    assert [len(tokens) for tokens in report["tokens"]] == list(LENGTHS)
    assert report["replayed"] == report["tokens"]
    assert all(report["graphs"][name]["replays"] for name in ("full 2", "full 4", "piecewise 24"))


def test_what_graphs_hold_of_ours(report):
    """Full ones the writes to the ring; the rest runs between them, and beside piecewise ones."""
    for name, graph in report["graphs"].items():
        is_full = name.startswith("full")
        assert KERNELS & set(graph["kernels"]) == ({"store_ring"} if is_full else set())
        attention = [kernel for kernel in graph["kernels"] if "attention" in kernel]
        assert bool(attention) == is_full


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_only_graphs_show(report, name):
    """So the first test can fail."""
    tokens, replayed = report["faults"][name]
    assert [tokens] == report["tokens"][ONE_PROMPT]
    assert replayed != tokens


def test_everything_is_compiled_before_the_first_graph_and_the_first_request(report):
    assert sorted(report["warm_up"]) == sorted(KERNELS)
    assert report["later"] == []
