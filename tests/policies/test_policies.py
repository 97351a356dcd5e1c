"""Every policy in the real engine against the oracle, token for token."""

import itertools
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.oracle import policies
from tests.oracle.hf_eviction import OracleResult, generate_with_eviction
from tests.oracle.law import chi_square_of_sets
from tests.oracle.policies import Ranking
from tests.oracle.selection import Candidates
from tests.support.engines import engine, eviction_stats, generate, greedy, random_prompt
from tests.support.query_statistics import query_means, statistics_file

pytestmark = pytest.mark.slow

COMMON = {"budget": 128, "window": 16, "sinks": 4}
VASE = {"policy": "vase", "smoothing": 1, "protected": 0.25}
GREEDY = {**VASE, "sampling": "greedy"}
RANKINGS = {
    "snapkv": ({"policy": "snapkv", "smoothing": 1}, policies.snapkv()),
    "rkv": ({"policy": "rkv", "smoothing": 1}, policies.rkv(0.5)),
    "rkv-lambda": ({"policy": "rkv", "smoothing": 1, "lambda": 0.125}, policies.rkv(0.125)),
    "distinct": ({"policy": "distinct", "protected": 0.25}, policies.distinct(0.1)),
    "distinct-remembers": (
        {"policy": "distinct", "protected": 0.25, "memory": 1.0},
        policies.distinct(0.1, remembers=True),
    ),
    "distinct-strata": (
        {"policy": "distinct", "protected": 0.25, "strata": 3},
        policies.Stratified(policies.distinct(0.1).view, 3),
    ),
    "distinct-remembers-strata": (
        {"policy": "distinct", "protected": 0.25, "memory": 1.0, "strata": 2},
        policies.Stratified(policies.distinct(0.1, remembers=True).view, 2),
    ),
    "h2o": ({"policy": "h2o"}, policies.h2o(64)),
    "h2o-recent": ({"policy": "h2o", "recent": 100}, policies.h2o(100)),
    "expected": ({"policy": "expected"}, policies.expected()),
    "streaming": ({"policy": "streaming"}, policies.streaming()),
    "vase-variance": ({**GREEDY, "magnitude": "variance"}, policies.vase_greedy("variance")),
    "vase-l2": ({**GREEDY, "magnitude": "l2"}, policies.vase_greedy("l2")),
    "vase-no-magnitude": ({**GREEDY, "magnitude": "none"}, Ranking(policies.protect_sinks)),
    "vase-no-protection": ({**GREEDY, "protect": "none"}, Ranking(policies.protect_sinks)),
    "vase-evict-large": ({**VASE, "evict_large": True}, policies.evict_large("range")),
    "vase-evict-large-l2": (
        {**VASE, "evict_large": True, "magnitude": "l2"},
        policies.evict_large("l2"),
    ),
}
DRAWN = {
    "random": {"policy": "random"},
    "vase-random-protection": {**VASE, "protect": "random"},
    "vase-random-protection-greedy": {**GREEDY, "protect": "random"},
    "vase-no-protection-drawn": {**VASE, "protect": "none"},
    "vase-variance-drawn": {**VASE, "magnitude": "variance"},
}
# Shorter than the budget, equal to it, longer by whole windows, longer by half a window, and much
# longer than a step may compute at once (chunked prefill).
PROMPT_LENGTHS = [20, 128, 160, 200, 600]
NUM_TOKENS = 230
SEED = 1000
OTHER_SEEDS = {
    ("vase-variance", 20): 3000,
    ("vase-variance", 600): 2000,
    ("vase-l2", 20): 2000,
    ("vase-evict-large", 20): 3000,
}
"""For the prompts after which the oracle meets a tie before its fifth eviction."""
CLEAR = 1e-6
"""Relative margin of a choice that rounding cannot turn."""


@pytest.fixture(scope="module")
def oracle(models):
    return AutoModelForCausalLM.from_pretrained(models.qwen3(), dtype=torch.float32).eval()


def by_oracle(oracle, prompt, selector, num_tokens=NUM_TOKENS, **margins) -> OracleResult:
    return generate_with_eviction(
        oracle,
        prompt,
        num_tokens,
        budget=128,
        window=16,
        protected=32,
        sinks=4,
        sampling=selector,
        **margins,
    )


def num_clear_tokens(want: OracleResult, prompt: list[int]) -> int:
    """Tokens up to the first choice that is not clear. Equal tokens have equal values in the first
    layer, and then slots and positions order a tie differently."""
    clear = list(itertools.takewhile(lambda e: e.margin > CLEAR, want.evictions))
    assert len(clear) >= 5, "choose another seed: this prompt has ties too early"
    if len(clear) == len(want.evictions):
        return NUM_TOKENS
    return want.evictions[len(clear)].position - len(prompt) + 1


class Recorder:
    """What one sequence's evictions were, by layer and how many came before."""

    def __init__(self) -> None:
        self.draws, self.kept_keys, self.masks = {}, {}, {}

    def observe(self, candidates, priority, keep) -> None:
        which = *candidates.draws.layers, candidates.eviction_index
        self.draws[which] = candidates.draws
        # Copies: the eviction moves tokens to other slots.
        self.kept_keys[which] = [
            keys[:, kept].T.clone() for keys, kept in zip(candidates.keys, keep, strict=True)
        ]
        self.masks[which] = keep.clone()

    def same_keys(self, candidates: Candidates) -> torch.Tensor:
        """A selector of the oracle: whose keys the engine kept, wherever they lay."""
        kept = self.kept_keys[candidates.layer, candidates.eviction_index][candidates.kv_head]
        distances = torch.cdist(kept, candidates.keys, compute_mode="donot_use_mm_for_euclid_dist")
        nearest, second = distances.topk(2, largest=False).values.unbind(dim=-1)
        assert (nearest < 0.01 * second).all(), "a key that the oracle's cache does not hold"
        chosen = distances.argmin(dim=-1)
        assert set(range(candidates.sinks)) <= set(candidates.positions[chosen].tolist())
        return chosen


@contextmanager
def recorded_engine(models, settings, **options):
    """An engine, and a record of its evictions."""
    recorder = Recorder()
    with engine(models.qwen3(), settings, **options) as llm:
        llm.collective_rpc("observe_evictions", args=(recorder,))
        yield llm, recorder


def assert_tokens_equal(models, oracle, name, settings, policy) -> None:
    """Those of the engine, and those of the oracle under the same policy."""
    prompts = [
        random_prompt(length, OTHER_SEEDS.get((name, length), SEED) + length)
        for length in PROMPT_LENGTHS
    ]
    with engine(models.qwen3(), {**COMMON, **settings}, max_num_batched_tokens=200) as llm:
        got = generate(llm, prompts, greedy(NUM_TOKENS))
        evictions = eviction_stats(llm)["evictions"]
    num_evictions = 0
    for prompt, tokens in zip(prompts, got, strict=True):
        want = by_oracle(oracle, prompt, policy, margins=policy.margins)
        num_evictions += len(want.evictions)
        num_tokens = num_clear_tokens(want, prompt)
        assert tokens[:num_tokens] == want.token_ids[:num_tokens]
    assert evictions == num_evictions


@pytest.mark.parametrize("name", RANKINGS)
def test_tokens_equal_those_of_the_oracle(models, oracle, name):
    assert_tokens_equal(models, oracle, name, *RANKINGS[name])


def test_triattention_equals_the_oracle_with_the_same_statistics(models, oracle):
    config = oracle.config
    group = config.num_attention_heads // config.num_key_value_heads
    shape = {
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "theta": config.rope_parameters["rope_theta"],
    }

    def means(candidates):
        return query_means(candidates.layer, candidates.kv_head, group, config.head_dim, **shape)

    statistics = statistics_file(group, config.head_dim, **shape)
    settings = {"policy": "triattention", "statistics": statistics}
    policy = policies.triattention(means)
    assert_tokens_equal(models, oracle, "triattention", settings, policy)


@pytest.mark.parametrize("gaussian", ["fixed", "redrawn"])
def test_cur_equals_the_oracle_with_the_same_matrices(models, oracle, gaussian):
    """The oracle is given the matrices, and chooses and decodes by itself."""
    settings = {**COMMON, "policy": "cur", "gaussian": gaussian, "columns": 4}

    def sketch(candidates):
        draws = recorder.draws[candidates.layer, candidates.eviction_index]
        return draws.gaussian(candidates.keys.shape[-1], 4, gaussian == "redrawn")[0]

    policy = policies.cur(sketch)
    with recorded_engine(models, settings) as (llm, recorder):
        for length in (20, 160, 600):
            prompt = random_prompt(length, SEED + length)
            (tokens,) = generate(llm, [prompt], greedy(NUM_TOKENS))
            want = by_oracle(oracle, prompt, policy, margins=policy.margins)
            num_tokens = num_clear_tokens(want, prompt)
            assert tokens[:num_tokens] == want.token_ids[:num_tokens]


@pytest.mark.parametrize("settings", DRAWN.values(), ids=DRAWN)
def test_random_choices_are_carried_out(models, oracle, settings):
    """Each request by itself, replayed by the oracle; and all of them again in one batch."""
    prompts = [random_prompt(length, SEED + length) for length in (100, 160, 600)]
    num_tokens = 150
    with recorded_engine(models, {**COMMON, **settings}, max_num_batched_tokens=200) as (
        llm,
        recorder,
    ):
        alone = []
        for prompt in prompts:
            alone += generate(llm, [prompt], greedy(num_tokens))
            want = by_oracle(oracle, prompt, recorder.same_keys, num_tokens)
            assert len(want.evictions) >= 5
            assert alone[-1] == want.token_ids
            assert all(mask.sum(dim=-1).eq(128 - 16).all() for mask in recorder.masks.values())
        assert generate(llm, prompts, greedy(num_tokens)) == alone


def test_random_keeps_every_set_of_slots_equally_often(models):
    settings = {"policy": "random", "budget": 8, "window": 2, "sinks": 2}
    counts: Counter[tuple[int, ...]] = Counter()
    with recorded_engine(models, settings) as (llm, recorder):
        for seed in range(3):
            generate(llm, [random_prompt(5, seed)], greedy(300))
            for mask in recorder.masks.values():
                counts.update(tuple(row.nonzero().flatten().tolist()) for row in mask)
    # Of 8 candidates the sinks stay, and 4 of the other 6.
    law = {(0, 1, *kept): 1 / 15 for kept in itertools.combinations(range(2, 8), 4)}
    assert counts.total() > 1500
    assert chi_square_of_sets(counts, law) > 0.001
