"""The real engine against an independent contiguous-cache implementation, token for token."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, TokensPrompt

from tests.oracle.hf_eviction import EvictingDecoder, generate_with_eviction
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
            # Equal tokens have equal values in the first layer, and then slots and positions order
            # a tie differently. The comparison goes as far as every choice is a clear one.
            clear = list(itertools.takewhile(lambda e: e.margin > 1e-6, want.evictions))
            assert len(clear) >= 5, "choose another seed: this prompt has ties too early"
            num_tokens = NUM_TOKENS
            if len(clear) < len(want.evictions):
                num_tokens = want.evictions[len(clear)].position - len(prompt) + 1
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
