"""The real engine against an independent contiguous-cache implementation, token for token."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, TokensPrompt

from tests.oracle.hf_eviction import EvictingDecoder, OracleResult, generate_with_eviction
from tests.oracle.selection import Settings
from tests.support.engines import (
    engine,
    eviction_stats,
    generate,
    greedy,
    num_used_blocks,
    random_prompt,
)

pytestmark = pytest.mark.slow

EVICTION = {"budget": 128, "window": 16, "protected": 0.25, "sinks": 4}
EXACT = {**EVICTION, "sampling": "greedy", "smoothing": 1}
# Shorter than the budget, equal to it, longer by whole windows, longer by half a window, and much
# longer than a step may compute at once (chunked prefill).
PROMPT_LENGTHS = [20, 128, 160, 200, 600]
NUM_TOKENS = 230
SEED = 1000


def num_clear_tokens(want: OracleResult, prompt_len: int) -> int:
    """Tokens of an output up to which every choice of its evictions is a clear one.

    Equal tokens have equal values in the first layer, and then slots and positions order a tie
    differently.
    """
    clear = list(itertools.takewhile(lambda e: e.margin > 1e-6, want.evictions))
    if len(clear) == len(want.evictions):
        return len(want.token_ids)
    assert len(clear) >= 5, "choose another seed: this prompt has ties too early"
    return want.evictions[len(clear)].position - prompt_len + 1


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {}),
        ("llama", {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 32}),
        ("llama", {"num_attention_heads": 2, "head_dim": 80}),
    ],
    ids=["qwen3-gqa2", "llama-gqa3", "llama-mha-d80"],
)
def test_tokens_equal_those_of_the_oracle(models, family, changes):
    directory = getattr(models, family)(**changes)
    prompts = [random_prompt(length, SEED + length) for length in PROMPT_LENGTHS]
    # All prompts at once: prefill chunks and decodes of several ages share the steps.
    with engine(directory, EXACT, max_num_batched_tokens=200) as llm:
        got = generate(llm, prompts, greedy(NUM_TOKENS))
        evictions = eviction_stats(llm)["evictions"]
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    num_evictions = 0
    with torch.inference_mode():
        for prompt, tokens in zip(prompts, got, strict=True):
            want = generate_with_eviction(
                oracle, prompt, NUM_TOKENS, budget=128, window=16, protected=32, sinks=4
            )
            num_evictions += len(want.evictions)
            num_tokens = num_clear_tokens(want, len(prompt))
            assert tokens[:num_tokens] == want.token_ids[:num_tokens]
    assert evictions == num_evictions


def test_a_bounded_prefill_equals_the_oracles(models):
    """A prompt longer than the pool is computed in it, and scored as decoding would score it."""
    directory = models.qwen3()
    prompts = [random_prompt(length, SEED + length) for length in (20, 160, 600)]
    # 16 blocks, of which a sequence at its bound takes 5 and its queries 1.
    pool = {"kv_cache_memory_bytes": 17 * 2 * 2 * 32 * 128 * 4}
    scoring = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, prompt_logprobs=0
    )
    with engine(
        directory, EXACT | {"prefill": "bounded"}, max_num_batched_tokens=200, **pool
    ) as llm:
        got = generate(llm, prompts, greedy(NUM_TOKENS))
        evictions = eviction_stats(llm)["evictions"]
        requests = [TokensPrompt(prompt_token_ids=prompts[-1])]
        (scored,) = llm.generate(requests, scoring, use_tqdm=False)
        assert num_used_blocks(llm) == 0
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    num_evictions = 0
    settings = Settings(budget=128, window=16, protected=32, sinks=4, smoothing=1, temperature=1.0)
    with torch.inference_mode():
        for prompt, tokens in zip(prompts, got, strict=True):
            want = generate_with_eviction(
                oracle, prompt, NUM_TOKENS, **vars(settings), bounded_prefill=True
            )
            num_evictions += len(want.evictions)
            assert want.margin > 1e-6, "choose another seed: this prompt has ties"
            assert tokens == want.token_ids
        decoder = EvictingDecoder(oracle, settings)
        logits = decoder.prefill_bounded(prompts[-1])
    assert evictions == num_evictions
    assert len(decoder.evictions) == 29
    assert list(scored.outputs[0].token_ids) == got[-1]
    tokens = prompts[-1][1:]
    found = [
        position[token].logprob
        for position, token in zip(scored.prompt_logprobs[1:], tokens, strict=True)
    ]
    wanted = logits[:-1].log_softmax(dim=-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=1e-3)


def test_requests_with_settings_of_their_own_equal_the_oracles(models):
    """Kept prompts, other budgets and none at all in one batch, whose prompts share their blocks.

    To the oracle a kept prompt is so many sinks and so much more budget.
    """
    prompt = random_prompt(100, SEED + 3)
    kept = {"sinks": 100, "protected": 32 - 4 + 100, "budget": 128 + 100}
    half_kept = {"sinks": 100, "protected": 16 - 4 + 100, "budget": 64 + 100}
    cases = [
        ({}, {}),
        ({"kv_eviction_prompt": "keep"}, kept),
        ({"kv_eviction_budget": 64}, {"budget": 64, "protected": 16}),
        ({"kv_eviction_budget": 64, "kv_eviction_prompt": "keep"}, half_kept),
        ({"kv_eviction": "none"}, {"budget": 10_000}),
    ]
    requests = [TokensPrompt(prompt_token_ids=prompt)] * len(cases)
    params = [
        SamplingParams(
            temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, extra_args=own
        )
        for own, _ in cases
    ]
    with engine(models.qwen3(), EXACT) as llm:
        outputs = llm.generate(requests, params, use_tqdm=False)
        evictions = eviction_stats(llm)["evictions"]
        again = llm.generate(requests, params, use_tqdm=False)
        assert num_used_blocks(llm) == 0
    assert [output.num_cached_tokens for output in again] == [96] * len(cases)
    oracle = AutoModelForCausalLM.from_pretrained(models.qwen3(), dtype=torch.float32).eval()
    num_evictions = 0
    for (_, changes), output, repeated in zip(cases, outputs, again, strict=True):
        settings = {"budget": 128, "window": 16, "protected": 32, "sinks": 4} | changes
        with torch.inference_mode():
            want = generate_with_eviction(oracle, prompt, NUM_TOKENS, **settings)
        num_evictions += len(want.evictions)
        clear = slice(num_clear_tokens(want, len(prompt)))
        assert list(output.outputs[0].token_ids)[clear] == want.token_ids[clear]
        assert list(repeated.outputs[0].token_ids) == list(output.outputs[0].token_ids)
    assert evictions == num_evictions


def test_without_evictions_the_tokens_are_those_of_the_full_cache(models):
    """A budget that no sequence reaches changes nothing, in bf16 as well."""
    prompts = [random_prompt(length, length) for length in (5, 300)]
    for dtype in ("float32", "bfloat16"):
        results = []
        for eviction in (None, {**EVICTION, "budget": 1900}):
            with engine(models.qwen3(), eviction, dtype=dtype) as llm:
                results.append(generate(llm, prompts, greedy(200)))
        assert results[0] == results[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_evictions_run_in_half_precision(models, dtype):
    prompts = [random_prompt(length, length) for length in (20, 300)]
    results = []
    for eviction in (None, EVICTION):
        with engine(models.qwen3(), eviction, dtype=dtype) as llm:
            results.append(generate(llm, prompts, greedy(NUM_TOKENS)))
            if eviction:
                assert eviction_stats(llm)["evictions"] >= 10
    for prompt, full, evicted in zip(prompts, *results, strict=True):
        # Up to the first eviction nothing differs; afterwards everything may.
        first = 128 + 16 * -(-(max(len(prompt), 128) + 1 - 128) // 16) - len(prompt)
        assert full[: first + 1] == evicted[: first + 1]
        assert full != evicted
