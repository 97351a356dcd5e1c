"""The decoder of the oracle: what it decodes, when it evicts, and what it keeps."""

import itertools
import math
import random

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.oracle.hf_eviction import EvictingDecoder, OracleResult, generate_with_eviction
from tests.oracle.selection import Candidates, Settings, select_greedy

LAYERS, KV_HEADS, VOCAB = 2, 2, 211
SMALL = {"budget": 24, "window": 8, "protected": 6, "sinks": 3}


def make_model(family: str) -> PreTrainedModel:
    """A random model whose attention is far from uniform, in eager mode."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}
    if family == "llama":
        shape = {"hidden_size": 128, "num_attention_heads": 8, "head_dim": 64}
    common = shape | {
        "vocab_size": VOCAB,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    torch.manual_seed(7)
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common))
        for layer in model.model.layers:  # all ones after the initialisation, whatever its range
            layer.self_attn.q_norm.weight.data.uniform_(0.5, 2.5)
            layer.self_attn.k_norm.weight.data.uniform_(0.5, 2.5)
    elif family == "qwen2":
        del common["head_dim"]
        model = Qwen2ForCausalLM(Qwen2Config(**common))
        for layer in model.model.layers:  # zero after the initialisation
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.bias.data.normal_()
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["qwen3", "llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedModel:
    return make_model("qwen3")


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=count)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Decoding


def test_with_room_for_all_it_is_hf_generate(model: PreTrainedModel) -> None:
    prompt, count = tokens(37), 60
    result = generate_with_eviction(
        model, prompt, count, budget=128, window=16, protected=32, sinks=4
    )
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    assert result.token_ids == expected[0, len(prompt) :].tolist()
    assert result.evictions == []
    assert min(result.top2_gaps) > 1e-4, "the model has near-ties: choose another seed"


def test_top_two_logits_are_those_of_hf(qwen3: PreTrainedModel) -> None:
    prompt = tokens(20)
    result = generate_with_eviction(qwen3, prompt, 10, budget=64, window=8, protected=8, sinks=4)
    with torch.inference_mode():
        logits = qwen3(torch.tensor([prompt + result.token_ids])).logits[0]
    best = logits[len(prompt) - 1 : -1].topk(2)
    assert best.indices.T.tolist() == [result.token_ids, result.runner_up_ids]
    gaps = best.values[:, 0] - best.values[:, 1]
    torch.testing.assert_close(gaps, torch.tensor(result.top2_gaps), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampling", ["greedy", "gumbel"])
@pytest.mark.parametrize("prompt_length", [5, 41], ids=["short_prompt", "long_prompt"])
def test_decoding_is_one_masked_pass(
    model: PreTrainedModel, sampling: str, prompt_length: int
) -> None:
    """All logits are those of a single dense HF pass, masked with the sets that the log tells."""
    sequence = tokens(90)
    decoder = EvictingDecoder(model, Settings(**SMALL), sampling, generator(3))
    logits = [decoder.prefill(sequence[:prompt_length])]
    logits += [decoder.step(token) for token in sequence[prompt_length:]]
    assert len(decoder.evictions) >= 5

    query_heads = model.config.num_attention_heads
    group = query_heads // KV_HEADS
    visible = torch.ones(LAYERS, query_heads, 90, 90).tril().bool()
    for eviction in decoder.evictions:
        for (layer, head), log in eviction.heads.items():
            gone = sorted(set(log.before) - set(log.after))
            for query_head in range(head * group, (head + 1) * group):
                visible[layer, query_head, eviction.position :, gone] = False

    def mask(layer: int):
        added = torch.where(visible[layer], 0.0, float("-inf"))[None]
        return lambda module, args, kwargs: (args, kwargs | {"attention_mask": added})

    hooks = [
        block.self_attn.register_forward_pre_hook(mask(layer), with_kwargs=True)
        for layer, block in enumerate(model.model.layers)
    ]
    try:
        with torch.inference_mode():
            expected = model(torch.tensor([sequence])).logits[0, prompt_length - 1 :]
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(torch.stack(logits), expected, atol=1e-3, rtol=1e-4)
    with torch.inference_mode():
        unmasked = model(torch.tensor([sequence])).logits[0, prompt_length - 1 :]
    assert (unmasked - expected).abs().max() > 0.1, "the eviction does not matter to this model"


@pytest.mark.parametrize("prompt_length", [10, 27], ids=["decoded_window", "window_of_both"])
def test_selection_is_made_of_the_models_own_queries_keys_and_values(
    model: PreTrainedModel, prompt_length: int
) -> None:
    """At the first eviction all is dense, so that HF's attention weights tell the scores."""
    sequence = tokens(33, seed=4)
    settings = Settings(**SMALL)
    seen: list[Candidates] = []

    def spy(candidates: Candidates) -> torch.Tensor:
        seen.append(candidates)
        return select_greedy(candidates)

    decoder = EvictingDecoder(model, settings, spy)
    decoder.prefill(sequence[:prompt_length])
    for token in sequence[prompt_length:]:
        decoder.step(token)
    assert [c.step for c in seen] == [32] * LAYERS * KV_HEADS

    values: list[torch.Tensor] = []
    hooks = [
        block.self_attn.v_proj.register_forward_hook(lambda m, args, out: values.append(out[0]))
        for block in model.model.layers
    ]
    try:
        with torch.inference_mode():
            output = model(torch.tensor([sequence[:32]]), output_attentions=True, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    window, count = settings.window, 32 - settings.window
    for c in seen:
        weights = output.attentions[c.layer][0]  # [query heads, 32, 32]
        weights = weights.unflatten(0, (KV_HEADS, -1))[c.kv_head, :, -window:, :count]
        weights = weights / weights.sum(dim=-1, keepdim=True)  # the softmax over candidates only
        torch.testing.assert_close(c.scores, weights.mean(dim=(0, 1)), atol=1e-6, rtol=1e-4)
        value = values[c.layer].unflatten(-1, (KV_HEADS, -1))[:count, c.kv_head]
        expected = value.max(dim=-1).values - value.min(dim=-1).values
        torch.testing.assert_close(c.ranges[3:], expected[3:], atol=1e-4, rtol=1e-4)
        assert c.ranges[:3].isinf().all()
        assert c.positions.tolist() == list(range(count))
        cache = output.past_key_values.layers[c.layer]
        torch.testing.assert_close(c.keys, cache.keys[0, c.kv_head, :count], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(c.values, value, atol=1e-4, rtol=1e-4)


# When


@pytest.mark.parametrize(
    ("prompt_length", "budget", "window"),
    [
        (1, 24, 8),
        (23, 24, 8),
        (24, 24, 8),
        (25, 24, 8),
        (31, 24, 8),
        (32, 24, 8),
        (33, 24, 8),
        (40, 24, 8),
        (59, 24, 8),
        (5, 21, 8),
        (29, 21, 8),
        (16, 16, 16),
        (30, 12, 1),
    ],
)
def test_evictions_follow_the_closed_form(
    qwen3: PreTrainedModel, prompt_length: int, budget: int, window: int
) -> None:
    protected = min(4, budget - window)
    decoder = EvictingDecoder(
        qwen3, Settings(budget, window, protected=protected, sinks=min(2, protected))
    )
    first = budget + window * math.ceil((max(prompt_length, budget) + 1 - budget) / window)
    end = first + 2 * window + 3
    sequence = tokens(end)
    decoder.prefill(sequence[:prompt_length])
    assert decoder.cached_length == prompt_length
    for position in range(prompt_length, end):
        decoder.step(sequence[position])
        slot = position if position < first else budget + (position - first) % window
        assert decoder.cached_length == slot + 1, f"after the step of position {position}"
    assert [e.position for e in decoder.evictions] == list(range(first, end, window))


def test_an_eviction_waits_for_the_step_that_needs_it(qwen3: PreTrainedModel) -> None:
    # Steps run at positions 10 to 10 + count - 2, and the first eviction comes before that of 32.
    for count, evictions in [(23, 0), (24, 1)]:
        result = generate_with_eviction(qwen3, tokens(10), count, **SMALL)
        assert len(result.token_ids) == count
        assert len(result.evictions) == evictions


# What


@pytest.mark.parametrize("sampling", ["greedy", "gumbel"])
@pytest.mark.parametrize("prompt_length", [9, 50], ids=["short_prompt", "long_prompt"])
def test_invariants_of_every_eviction(
    model: PreTrainedModel, sampling: str, prompt_length: int
) -> None:
    result = generate_with_eviction(
        model, tokens(prompt_length), 90, **SMALL, sampling=sampling, generator=generator(1)
    )
    budget, window, sinks = SMALL["budget"], SMALL["window"], SMALL["sinks"]
    held: dict[tuple[int, int], set[int]] = {}
    last = 0
    assert len(result.evictions) >= 5
    for eviction in result.evictions:
        position = eviction.position
        assert set(eviction.heads) == set(itertools.product(range(LAYERS), range(KV_HEADS)))
        for key, head in eviction.heads.items():
            before, after = set(head.before), set(head.after)
            assert list(head.before) == sorted(before)
            assert list(head.after) == sorted(after)
            assert before == held.get(key, set()) | set(range(last, position))
            assert after < before
            assert len(after) == budget
            assert after >= set(range(sinks)), "a sink is gone"
            assert after >= set(range(position - window, position)), "the window is gone"
            held[key] = after
        last = position
    assert len({tuple(sorted(kept)) for kept in held.values()}) == LAYERS * KV_HEADS


def test_the_same_seed_draws_the_same_and_another_seed_does_not(qwen3: PreTrainedModel) -> None:
    def run(seed: int) -> OracleResult:
        return generate_with_eviction(
            qwen3, tokens(40), 30, **SMALL, sampling="gumbel", generator=generator(seed)
        )

    assert run(1) == run(1)
    assert run(1).evictions != run(2).evictions


def test_the_choices_of_another_can_be_replayed(qwen3: PreTrainedModel) -> None:
    drawn = generate_with_eviction(
        qwen3, tokens(40), 60, **SMALL, sampling="gumbel", generator=generator(5)
    )
    recorded = {e.position: e.heads for e in drawn.evictions}

    def replay(c: Candidates) -> torch.Tensor:
        after = torch.tensor(recorded[c.step][c.layer, c.kv_head].after)
        return torch.isin(c.positions, after).nonzero().flatten()

    assert generate_with_eviction(qwen3, tokens(40), 60, **SMALL, sampling=replay) == drawn


@pytest.mark.parametrize(
    "indices",
    [list(range(15)), [0] * 16, [*range(15), 24], [-1, *range(15)]],
    ids=["too_few", "repeated", "of_the_window", "negative"],
)
def test_a_wrong_selector_is_refused(qwen3: PreTrainedModel, indices: list[int]) -> None:
    with pytest.raises(ValueError, match="16 distinct candidates"):
        generate_with_eviction(
            qwen3, tokens(10), 24, **SMALL, sampling=lambda _: torch.tensor(indices)
        )


def test_tokens_that_repeat_tie_in_layer_0(qwen3: PreTrainedModel) -> None:
    """Position is in the keys only, so that equal tokens have equal values in the first layer."""
    result = generate_with_eviction(qwen3, [5] * 40, 12, **SMALL)
    (eviction,) = result.evictions
    assert result.margin == eviction.margin < 1e-5
    for head in range(KV_HEADS):
        assert eviction.heads[0, head].range_margin < 1e-5
    assert generate_with_eviction(qwen3, [5] * 40, 2, **SMALL).margin == float("inf")


# Refusals


def test_models_that_it_would_get_wrong_are_refused() -> None:
    model, settings = make_model("qwen3"), Settings(**SMALL)
    with pytest.raises(ValueError, match="eval"):
        EvictingDecoder(model.train(), settings)
    with pytest.raises(ValueError, match="float32"):
        EvictingDecoder(model.eval().bfloat16(), settings)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="full attention"):
        EvictingDecoder(model, settings)
    model.config.model_type = "gemma3"
    with pytest.raises(ValueError, match="gemma3"):
        EvictingDecoder(model, settings)


def test_misuse_is_refused(qwen3: PreTrainedModel) -> None:
    decoder = EvictingDecoder(qwen3, Settings(**SMALL))
    with pytest.raises(ValueError, match="prefill"):
        decoder.step(1)
    with pytest.raises(ValueError, match="empty"):
        decoder.prefill([])
    decoder.prefill([1, 2])
    with pytest.raises(ValueError, match="prefill"):
        decoder.prefill([3])
    with pytest.raises(ValueError, match="sampling"):
        EvictingDecoder(qwen3, Settings(**SMALL), "nucleus")
