"""What vLLM lets a caller do with a running engine, under eviction: sleep, reload, beam search."""

from pathlib import Path

import pytest
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import BeamSearchParams

from tests.support.engines import (
    add_request,
    drain,
    engine,
    eviction_stats,
    generate,
    greedy,
    num_used_blocks,
    random_prompt,
)
from vase_vllm.tools.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

EVICTION = {"budget": 48, "window": 16}
NUM_TOKENS = 100
"""Evictions at 64, 80, ... of whatever begins shorter than that."""
PROMPTS = [random_prompt(length, length, vocab_size=256) for length in (10, 45, 120)]
PARAMS = [
    greedy(NUM_TOKENS),
    SamplingParams(temperature=1.0, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True),
    greedy(NUM_TOKENS),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calls")


@pytest.fixture(scope="module")
def llm(directory):
    model = make_tiny_model(directory / "model", layers=2, dtype="float32")
    with engine(model, EVICTION, skip_tokenizer_init=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def undisturbed(llm) -> list[list[int]]:
    return generate(llm, PROMPTS, PARAMS)


def start(llm: LLM) -> None:
    """Run the requests until all of them have evicted."""
    before = eviction_stats(llm)["evictions"]
    for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        add_request(llm, str(index), prompt, params)
    for _ in range(70):
        llm.llm_engine.step()
    assert eviction_stats(llm)["evictions"] >= before + 8
    assert num_used_blocks(llm) > 0


def finish(llm: LLM) -> list[list[int]]:
    results = drain(llm)
    assert num_used_blocks(llm) == 0
    return [results[str(index)] for index in range(len(PROMPTS))]


@pytest.mark.parametrize("level", [1, 2])
def test_running_requests_go_on_after_a_sleep(llm, undisturbed, level):
    """The pages are lost, at level 2 the weights too.

    A CPU's worker does not sleep: the test does to its memory what a GPU's would lose.
    """
    start(llm)
    llm.sleep(level=level, mode="keep")
    assert num_used_blocks(llm) == 0
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    for kv_cache in runner.kv_caches:
        # Not NaN: attention multiplies what it masks by 0.
        kv_cache.fill_(1e4)
    if level == 2:
        for weight in runner.model.parameters():
            weight.data.zero_()
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
    else:
        llm.wake_up()
    evictions = eviction_stats(llm)["evictions"]
    assert finish(llm) == undisturbed
    # They went through their evictions again.
    assert eviction_stats(llm)["evictions"] > evictions + 8
    # The prefix cache has forgotten the pages that are gone.
    assert generate(llm, PROMPTS, PARAMS) == undisturbed


def test_weights_are_reloaded_in_place(llm, directory, undisturbed):
    other = make_tiny_model(directory / "other", layers=2, dtype="float32", seed=1)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    assert llm.reset_prefix_cache()
    before = eviction_stats(llm)["evictions"]
    changed = generate(llm, PROMPTS, PARAMS)
    assert all(a != b for a, b in zip(changed, undisturbed, strict=True))
    assert eviction_stats(llm)["evictions"] > before + 8
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory / "model")})
    assert llm.reset_prefix_cache()
    assert generate(llm, PROMPTS, PARAMS) == undisturbed


def test_beam_search_is_that_of_the_full_cache(llm):
    """vLLM sends a beam as a prompt that grows, one token a request; a dense prefill is exact."""
    prompt = random_prompt(60, 7, vocab_size=256)
    before = eviction_stats(llm)["evictions"]

    def search(width: int):
        params = BeamSearchParams(beam_width=width, max_tokens=25, ignore_eos=True)
        (found,) = llm.beam_search([TokensPrompt(prompt_token_ids=prompt)], params)
        return found.sequences

    beams = search(3)
    # A beam alone is greedy decoding.
    (alone,) = search(1)
    full = SamplingParams(
        temperature=0, max_tokens=25, ignore_eos=True, extra_args={"kv_eviction": "none"}
    )
    assert alone.tokens[60:] == generate(llm, [prompt], full)[0]
    assert eviction_stats(llm)["evictions"] == before
    assert num_used_blocks(llm) == 0
    # Decoding does evict at this length, and what it samples is something else.
    assert alone.tokens[60:] != generate(llm, [prompt], greedy(25))[0]
    assert eviction_stats(llm)["evictions"] > before
    assert len({tuple(beam.tokens) for beam in beams}) == 3
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    for beam in beams:
        requests = [TokensPrompt(prompt_token_ids=beam.tokens)]
        (scored,) = llm.generate(requests, scoring, use_tqdm=False)
        scores = [
            position[token].logprob
            for position, token in zip(scored.prompt_logprobs[60:], beam.tokens[60:], strict=True)
        ]
        assert beam.cum_logprob == pytest.approx(sum(scores), abs=1e-3)
