"""The requests of a throughput run, as ``vllm bench serve`` will read them."""

from dataclasses import replace

import pytest
from vllm.benchmarks.datasets.datasets import CustomDataset

from benchmarks.common.workload import SEED, WARM_UP_SEED, draw_requests, write_dataset
from benchmarks.serving.suites import CPU_WORKLOADS, MIXED, sweep
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.tiny_model import byte_tokenizer


@pytest.mark.parametrize("workload", CPU_WORKLOADS, ids=lambda workload: workload.name)
def test_vllm_reads_prompts_and_lengths_as_drawn(workload, tmp_path):
    requests = draw_requests(workload, SEED)
    path = tmp_path / "requests.jsonl"
    write_dataset(requests, path)
    dataset = CustomDataset(dataset_path=str(path), disable_shuffle=True)
    samples = dataset.sample(
        byte_tokenizer(32768), len(requests), output_len=-1, skip_chat_template=True
    )
    assert [sample.prompt for sample in samples] == [request.prompt for request in requests]
    assert {sample.prompt_len for sample in samples} == {workload.prefix_len + workload.input_len}
    assert [sample.expected_output_len for sample in samples] == [r.output_len for r in requests]
    assert max(r.output_len for r in requests) < workload.max_model_len - samples[0].prompt_len


def test_prompts_share_their_prefix_and_nothing_else():
    shared = next(w for w in CPU_WORKLOADS if w.prefix_len)
    requests = draw_requests(shared, SEED)
    assert len({request.prompt[: shared.prefix_len] for request in requests}) == 1
    assert len({request.prompt[: shared.prefix_len + 8] for request in requests}) == len(requests)


def test_the_warm_up_leaves_nothing_in_the_prefix_cache():
    for workload in CPU_WORKLOADS:
        for budget in (None, 256):
            short = workload.warm_up(budget, window=64)
            starts = [
                {request.prompt[:16] for request in draw_requests(load, seed)}
                for load, seed in ((workload, SEED), (short, WARM_UP_SEED))
            ]
            assert not starts[0] & starts[1]
            assert short.input_len + short.output_len <= workload.max_model_len
            held = short.concurrency * (short.input_len + short.output_len)
            assert held <= workload.kv_tokens or short.concurrency == 1


def test_a_mixture_has_the_requests_of_its_parts_in_an_order_of_its_own():
    requests = draw_requests(MIXED, SEED)
    assert len(requests) == MIXED.num_requests
    longest = max(len(request.prompt) + request.output_len for request in requests)
    assert longest < MIXED.max_model_len
    long_prompts = [len(request.prompt) >= 512 for request in requests]
    assert sum(long_prompts) == MIXED.mixture[0].num_requests
    assert long_prompts != sorted(long_prompts, reverse=True)
    for name, own, lengths in (
        ("input_len", MIXED.input_len, [len(request.prompt) for request in requests]),
        ("output_len", MIXED.output_len, [request.output_len for request in requests]),
    ):
        of_parts = sum(part.num_requests * getattr(part, name) for part in MIXED.mixture)
        assert own == pytest.approx(of_parts / len(requests), rel=0.01)
        assert own == pytest.approx(sum(lengths) / len(lengths), rel=0.15)
    assert len({request.prompt[:16] for request in requests}) == len(requests)
    assert draw_requests(MIXED, SEED) == requests
    assert {r.prompt for r in requests}.isdisjoint(
        r.prompt for part in MIXED.mixture for r in draw_requests(part, SEED)
    )


def test_the_warm_up_evicts():
    schedule = EvictionSchedule(2048, 64)
    short = sweep().warm_up(schedule.budget, schedule.window)
    assert schedule.evictions(short.input_len, short.output_len)[0] > 0
    assert short.num_requests == short.concurrency == 16


def test_lengths_spread_around_their_mean():
    workload = replace(CPU_WORKLOADS[0], num_requests=1000, output_len=100, spread=0.5)
    lengths = [request.output_len for request in draw_requests(workload, SEED)]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert sum(lengths) / len(lengths) == pytest.approx(100, abs=5)


def test_a_sweep_has_prompts_of_many_lengths_and_draws_anew_at_each_concurrency():
    first, second = (sweep(waves=2).at(concurrency) for concurrency in (16, 512))
    assert (first.num_requests, second.num_requests) == (32, 1024)
    requests = draw_requests(second, 32)
    lengths = [len(request.prompt) for request in requests]
    assert min(lengths) >= 512
    assert max(lengths) <= 1536
    assert len(set(lengths)) > 500
    assert max(lengths) + second.output_len <= second.max_model_len
    assert {request.output_len for request in requests} == {16384}
    starts = {request.prompt[:16] for request in requests}
    assert not starts & {request.prompt[:16] for request in draw_requests(first, 1)}
