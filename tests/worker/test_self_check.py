"""The proof at start-up that evictions happen: it passes where they do, and refuses where not."""

import pytest
import torch

from tests.support.engines import engine, eviction_stats, generate, greedy, random_prompt
from vase_vllm.errors import EvictionError
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.tiny_model import make_tiny_model
from vase_vllm.worker import self_check
from vase_vllm.worker.cpu_path import CPUPath
from vase_vllm.worker.evictor import TorchEvictor
from vase_vllm.worker.self_check import wrong_survivors

SCHEDULE = EvictionSchedule(budget=8, window=3)
EVICTION = {"budget": 96, "window": 16, "protected": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("self_check") / "model", layers=2)


def keys(dtype=torch.float32):
    """[2, T + W, 4] in front of an eviction, and the same slots after a right one."""
    before = torch.randn(2, SCHEDULE.bound, 4).to(dtype)
    after = before.clone()
    for head, kept in enumerate(([0, 1, 3, 4, 7], [0, 2, 3, 5, 6])):
        # In any order, and then the window.
        after[head, :8] = before[head, [*kept[::-1], 8, 9, 10]]
    after[:, 8] = torch.randn(2, 4).to(dtype)
    return before, after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_eviction_passes(dtype):
    assert wrong_survivors(SCHEDULE, *keys(dtype)) is None


def test_equal_tokens_may_have_equal_keys():
    before, after = keys()
    # Both were kept.
    before[0, 1], after[0, 3] = before[0, 3], before[0, 3]
    assert wrong_survivors(SCHEDULE, before, after) is None


def test_broken_numbers_are_moved_like_others():
    before, _ = keys()
    before[0, 0] = torch.nan
    after = before.clone()
    after[:, :8] = before[:, 3:]
    after[:, 8] = 1
    assert wrong_survivors(SCHEDULE, before, after) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda before, after: before.clone(), "tokens of the window were evicted"),
        (lambda before, after: after[:, [0, 0, *range(2, 11)]], "tokens were kept twice"),
        (lambda before, after: after.index_fill(1, torch.tensor([2]), 7), "that the sequence had"),
        (
            lambda before, after: after.index_copy(1, torch.tensor([8]), before[:, 8:9]),
            "the next token was not written",
        ),
    ],
    ids=["nothing happened", "twice", "foreign", "no next token"],
)
def test_a_wrong_eviction_does_not(change, reason):
    before, after = keys()
    assert reason in wrong_survivors(SCHEDULE, before, change(before, after)[:, : SCHEDULE.bound])


@pytest.mark.slow
def test_an_engine_checks_itself_and_counts_nothing_of_it(model, monkeypatch):
    lines = []
    monkeypatch.setattr(
        self_check.logger, "info", lambda line, *values: lines.append(line % values)
    )

    def of_the_check():
        return [line for line in lines if "self-check" in line]

    with engine(model, EVICTION, max_num_batched_tokens=20, max_num_seqs=4) as llm:
        (line,) = of_the_check()
        assert line.endswith("s: vase evicted 16 of 48 tokens from 2 layers.")
        assert set(eviction_stats(llm).values()) == {0}
        checked = generate(llm, [random_prompt(50, 0, vocab_size=256)], greedy(120))
    with engine(model, EVICTION | {"self_check": False}) as llm:
        assert of_the_check() == [line]
        assert generate(llm, [random_prompt(50, 0, vocab_size=256)], greedy(120)) == checked
        # vLLM makes a KV cache, and builders, first to measure the memory of CUDA graphs.
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        worker.model_runner._cleanup_profiling_kv_cache()
        worker.initialize_from_config(worker._kv_cache_config)
        assert len(worker._eviction.paths) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "method", "reason"),
    [
        (CPUPath, "_evict", "0 evictions of 0 tokens happened"),
        (TorchEvictor, "_move", "in layer 0 tokens of the window were evicted"),
    ],
)
def test_an_engine_that_does_not_evict_refuses_to_start(model, monkeypatch, of, method, reason):
    monkeypatch.setattr(of, method, lambda *_: None)
    with (
        pytest.raises(EvictionError, match=f"the self-check failed: {reason}") as error,
        engine(model, EVICTION),
    ):
        pass
    assert "--kv-eviction-config.self_check false" in str(error.value)
    assert "\n" not in str(error.value)
