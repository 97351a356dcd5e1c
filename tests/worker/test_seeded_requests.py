"""Seeded requests on a CPU: a draw that vLLM drops is taken back."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.support.engines import add_request, drain_counting_preemptions, engine, generate
from vase_vllm.tools.tiny_model import make_tiny_model
from vase_vllm.worker.seeded_requests import RewindableGenerator, prepare_to_rewind


def draw(generator):
    return torch.empty(4).exponential_(generator=generator).tolist()


def test_a_draw_is_taken_back():
    generator = RewindableGenerator()
    generator.manual_seed(5)
    plain = torch.Generator().manual_seed(5)
    assert draw(generator) == draw(plain)
    generator.remember()
    dropped = draw(generator)
    generator.set_offset(generator.get_offset() - 4)
    assert draw(generator) == dropped == draw(plain)


def test_requests_keep_their_place_in_the_sequence():
    plain = torch.Generator().manual_seed(7)
    draw(plain)
    state = plain.get_state()
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(generators={1: plain}, req_ids=["a", "b"], num_reqs=2),
        discard_request_mask=SimpleNamespace(np=np.array([True, True, False])),
        requests={"a": SimpleNamespace(generator=None), "b": SimpleNamespace(generator=plain)},
    )
    for _ in range(2):
        prepare_to_rewind(runner)
        (own,) = runner.input_batch.generators.values()
        assert runner.requests["b"].generator is own
        assert torch.equal(own.get_state(), state)
    assert runner.requests["a"].generator is None


@pytest.mark.slow
def test_preempted_seeded_requests_draw_what_they_draw_alone(tmp_path):
    model = make_tiny_model(tmp_path / "model", layers=2)
    prompts = [[2 + index] * (20 + 30 * index) for index in range(6)]
    params = [
        SamplingParams(temperature=1, seed=index, max_tokens=150, ignore_eos=True, detokenize=False)
        for index in range(6)
    ]
    # Blocks for two sequences at their bound.
    settings = {"budget": 64, "window": 16, "admission": "optimistic"}
    with engine(model, settings, num_gpu_blocks_override=12, max_num_batched_tokens=64) as llm:
        for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            add_request(llm, str(index), prompt, own)
        together, preemptions = drain_counting_preemptions(llm)
        assert sum(preemptions.values()) > 0
        alone = [
            generate(llm, [prompt], [own])[0] for prompt, own in zip(prompts, params, strict=True)
        ]
    assert [together[str(index)] for index in range(6)] == alone
