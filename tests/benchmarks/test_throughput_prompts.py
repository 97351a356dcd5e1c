"""The requests of a throughput run, as ``vllm bench serve`` will read them."""

from dataclasses import replace

import pytest
from vllm.benchmarks.datasets.datasets import CustomDataset

from benchmarks.common.prompts import SEED, WARM_UP_SEED, draw_requests, write_dataset
from benchmarks.serving.suites import CPU_WORKLOADS
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
        starts = [
            {request.prompt[:16] for request in draw_requests(workload, seed)}
            for seed in (SEED, WARM_UP_SEED)
        ]
        assert not starts[0] & starts[1]


def test_lengths_spread_around_their_mean():
    workload = replace(CPU_WORKLOADS[0], num_requests=1000, output_len=100, spread=0.5)
    lengths = [request.output_len for request in draw_requests(workload, SEED)]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert sum(lengths) / len(lengths) == pytest.approx(100, abs=5)
