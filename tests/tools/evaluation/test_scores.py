"""The engine's scores against an independent implementation, and what is computed from scores."""

import numpy as np
import pytest
import torch

from vase_vllm.tools.evaluation.scores import Scores, divergence

TOP = 20


def scores_of(logits: torch.Tensor, token_ids: list[int], top: int) -> Scores:
    """The scores that logits, [n, vocab], give to the tokens of a sequence of n."""
    logprobs = logits[:-1].double().log_softmax(dim=-1)
    true = torch.tensor(token_ids[1:])[:, None]
    values, ids = logprobs.topk(top)
    ranks = (logprobs >= logprobs.gather(1, true)).sum(dim=1)
    return Scores(
        torch.cat([true, ids], dim=1).int().numpy(),
        torch.cat([logprobs.gather(1, true), values], dim=1).float().numpy(),
        ranks.int().numpy(),
    )


def exact_divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> np.ndarray:
    p, q = (logits[:-1].double().log_softmax(dim=-1) for logits in (p_logits, q_logits))
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).numpy()


@pytest.mark.slow
def test_the_engines_scores_are_those_of_an_independent_implementation(models):
    from transformers import AutoModelForCausalLM

    from tests.oracle.hf_eviction import EvictingDecoder
    from tests.oracle.selection import Settings
    from tests.support.engines import random_prompt
    from vase_vllm.tools.evaluation.engine import parse_engine_arguments, scoring_engine
    from vase_vllm.tools.evaluation.methods import choose_methods

    directory, tokens = models.qwen3(), random_prompt(400, 1600)
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    settings = Settings(budget=128, window=16, protected=32, sinks=4, smoothing=1, temperature=1.0)
    decoder = EvictingDecoder(oracle, settings)
    with torch.inference_mode():
        evicted_logits = decoder.prefill_bounded(tokens)
        full_logits = oracle(torch.tensor([tokens])).logits[0]
    assert len(decoder.evictions) == 16
    assert min(e.margin for e in decoder.evictions) > 1e-6, "choose another seed: there are ties"
    wanted = scores_of(evicted_logits, tokens, TOP)

    _, method = choose_methods(["vase:sampling=greedy,smoothing=1"], [128], 16)
    arguments = ["--skip-tokenizer-init", "--dtype", "float32", "--block-size", "32"]
    arguments += ["--kv-cache-memory-bytes", "64M"]
    engine_args = parse_engine_arguments(arguments, str(directory))
    with scoring_engine(engine_args, method, len(tokens) + 1, TOP) as engine:
        found = engine.score(tokens, TOP)
        again = engine.score(tokens, 0)
    # Position by position, and far from what the full cache gives.
    np.testing.assert_allclose(found.logprobs[:, 0], wanted.logprobs[:, 0], rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.logprobs[:, 1:], wanted.logprobs[:, 1:], rtol=0, atol=1e-3)
    assert (found.token_ids[:, 0] == tokens[1:]).all()
    assert (found.top_tokens == wanted.top_tokens).mean() > 0.99
    # Of 32,768 tokens, a few have the same log-probability up to rounding.
    assert np.abs(found.ranks - wanted.ranks).max() <= 5
    np.testing.assert_allclose(again.nll, found.nll, rtol=0, atol=1e-4)
    unevicted = scores_of(full_logits, tokens, TOP)
    first = method.first_scored
    assert first == 144
    np.testing.assert_allclose(found.nll[:first], unevicted.nll[:first], rtol=0, atol=1e-3)
    assert np.abs(found.nll - unevicted.nll)[first:].mean() > 0.1
    # The divergence from the full cache's distribution is a lower bound of the exact one.
    exact = exact_divergence(full_logits, evicted_logits)
    bound = divergence(unevicted, found)
    assert (bound < exact + 1e-3).all()
    # A loose one: with random weights, two top twenties of 32,768 tokens have few in common.
    assert bound[first:].mean() > 0.01
    assert np.abs(bound[:first]).max() < 1e-3


def test_a_divergence_of_all_tokens_is_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 50, 40, generator=generator)
    tokens = torch.randint(40, (50,), generator=generator).tolist()
    exact = exact_divergence(p, q)
    found = divergence(scores_of(p, tokens, 40), scores_of(q, tokens, 40))
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4)
    previous = -1.0
    for top in (1, 5, 20, 39):
        bound = divergence(scores_of(p, tokens, top), scores_of(q, tokens, top))
        assert (bound <= exact + 1e-4).all()
        assert previous < bound.mean() < exact.mean() + 1e-4
        previous = bound.mean()


def test_equal_distributions_do_not_diverge():
    logits = torch.randn(30, 40, generator=torch.Generator().manual_seed(1)) * 5
    scores = scores_of(logits, [3] * 30, 10)
    assert divergence(scores, scores) == pytest.approx(0)


def test_scores_of_some_rows():
    scores = scores_of(torch.randn(10, 20, generator=torch.Generator().manual_seed(2)), [1] * 10, 4)
    assert scores[3:].nll.tolist() == scores.nll[3:].tolist()
    assert scores[3:].top_tokens.tolist() == scores.top_tokens[3:].tolist()
