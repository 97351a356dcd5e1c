"""One request with broken activations beside good ones: it harms nobody, as in plain vLLM."""

import pytest
import torch
from vllm import TokensPrompt

from tests.support.engines import engine, eviction_stats, greedy, num_used_blocks, random_prompt

pytestmark = pytest.mark.slow

EVICTION = {"budget": 96, "window": 16}


@pytest.mark.parametrize("policy", ["vase", "rkv"])
@pytest.mark.parametrize("number", [torch.nan, 1e38], ids=["nan", "overflow"])
def test_a_request_with_nan_activations(models, policy, number):
    embeddings = torch.randn(100, 128, generator=torch.Generator().manual_seed(0))
    embeddings[50] = number
    good = TokensPrompt(prompt_token_ids=random_prompt(100, 1))
    with engine(models.qwen3(), EVICTION | {"policy": policy}, enable_prompt_embeds=True) as llm:
        (alone,) = llm.generate([good], greedy(60), use_tqdm=False)
        before = eviction_stats(llm)["evictions"]
        prompts = [{"prompt_embeds": embeddings}, good]
        broken, beside = llm.generate(prompts, greedy(60), use_tqdm=False)
        assert len(broken.outputs[0].token_ids) == 60
        if number != number:
            # Plain vLLM gives a request whose logits are NaN the token 0.
            assert set(broken.outputs[0].token_ids) == {0}
        assert beside.outputs[0].token_ids == alone.outputs[0].token_ids
        assert eviction_stats(llm)["evictions"] == before + 2 * 3
        assert num_used_blocks(llm) == 0
