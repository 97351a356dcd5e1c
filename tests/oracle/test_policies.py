"""The policies of the oracle, by hand and against loops, and in its decoder."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from tests.oracle import policies
from tests.oracle.hf_eviction import EvictingDecoder, generate_with_eviction
from tests.oracle.law import chi_square_of_sets, set_probabilities
from tests.oracle.policies import Drawing, Ranking
from tests.oracle.selection import Candidates, Selector, Settings
from tests.oracle.test_decoder import SMALL, make_model, tokens

INF = float("inf")
DRAWS = 4000
# After a sink: the largest variance, the largest range, the largest norm, and small in every way.
VALUES = [[0.0, 0.0, 0.0], [6.0, 0.0, 6.0], [6.5, 3.0, 0.0], [5.0, 5.0, 5.0], [1.0, 0.0, 0.0]]
ATTENTION = [0.0, 0.3, 0.1, 0.2, 0.4]
FIRST_CHANNEL, SECOND_CHANNEL = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(
    scores: list[float],
    *,
    keep: int,
    protected: int = 2,
    sinks: int = 1,
    keys: list[list[float]] | None = None,
    values: list[list[float]] = VALUES,
) -> Candidates:
    """Candidates whose value ranges nobody may read: every policy has magnitudes of its own."""
    return Candidates(
        step=0,
        layer=0,
        kv_head=0,
        positions=torch.arange(len(scores)),
        scores=torch.tensor(scores),
        ranges=torch.full((len(scores),), torch.nan),
        protected=protected,
        keep=keep,
        sinks=sinks,
        eviction_index=0,
        keys=torch.tensor(keys or [[1.0, 0.0]] * len(scores)),
        values=torch.tensor(values),
        queries=torch.empty(0, 0, 2),
        window_keys=torch.empty(0, 2),
        window_values=torch.empty(0, 2),
        received=torch.empty(0),
    )


# Which survive


@pytest.mark.parametrize(
    ("magnitude", "expected"),
    [
        ("range", [0, 6, 6.5, 0, 1]),
        ("variance", [0, 12, 127 / 12, 0, 1 / 3]),
        ("l2", [0, math.sqrt(72), math.sqrt(51.25), math.sqrt(75), 1]),
    ],
)
def test_magnitudes_by_hand(magnitude: str, expected: list[float]) -> None:
    magnitudes = policies.value_magnitudes(torch.tensor(VALUES), magnitude)
    torch.testing.assert_close(magnitudes, torch.tensor(expected))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (policies.vase_greedy("range"), [0, 2, 4]),
        (policies.vase_greedy("variance"), [0, 1, 4]),
        (policies.vase_greedy("l2"), [0, 3, 4]),
        (Ranking(policies.protect_sinks), [0, 1, 4]),
        (policies.evict_large("range"), [0, 3, 4]),
        (policies.evict_large("variance"), [0, 3, 4]),
        (policies.evict_large("l2"), [0, 2, 4]),
        (policies.snapkv(), [0, 1, 4]),
        (policies.streaming(), [0, 3, 4]),
    ],
    ids=[
        "vase-range",
        "vase-variance",
        "vase-l2",
        "vase-none",
        "evict-large-range",
        "evict-large-variance",
        "evict-large-l2",
        "snapkv",
        "streaming",
    ],
)
def test_survivors_by_hand(policy: Ranking, kept: list[int]) -> None:
    assert sorted(policy(by_hand(ATTENTION, keep=3)).tolist()) == kept


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize(
    "policy",
    [
        policies.vase_greedy("l2"),
        policies.evict_large(),
        policies.snapkv(),
        policies.rkv(),
        policies.cur(lambda _: FIRST_CHANNEL.repeat(2, 1)[:3]),
        policies.streaming(),
        policies.uniform(generator(0)),
        Ranking(policies.protect_at_random(generator(0))),
        Drawing(policies.protect_large("variance"), generator(0)),
        Drawing(policies.protect_sinks, generator(0)),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_sinks_survive_whatever_they_are_like(policy: Selector, sinks: int) -> None:
    """The first positions have the least attention, the least values and the same key as others."""
    worst_first = [[0.1 * i, -0.1 * i, 0.0] for i in range(8)]
    candidates = by_hand(
        [0.01 * i for i in range(8)],
        keep=4,
        protected=3,
        sinks=sinks,
        keys=[[0.1 * i, 1.0, 1.0] for i in range(8)],
        values=worst_first,
    )
    kept = policy(candidates).tolist()
    assert len(set(kept)) == len(kept) == 4
    assert set(range(sinks)) <= set(kept)


def test_ties_go_to_the_lowest_position() -> None:
    candidates = by_hand([0.2] * 5, keep=3, values=[[1.0, 2.0]] * 5)
    for policy in (
        policies.vase_greedy("l2"),
        policies.evict_large(),
        policies.snapkv(),
        policies.rkv(),
        policies.cur(lambda _: FIRST_CHANNEL),
    ):
        assert sorted(policy(candidates).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("attention_weight", [0.5, 0.1])
def test_rkv_scores_are_the_formula(attention_weight: float) -> None:
    count, head_dim = 9, 4
    torch.manual_seed(0)
    keys = torch.randn(count, head_dim)
    keys[3] = 0  # similar to nothing, not even to itself
    keys[7] = 2 * keys[1]
    attention = torch.rand(count).softmax(dim=0)

    def cosine(i: int, j: int) -> float:
        dot = sum(float(keys[i, d]) * float(keys[j, d]) for d in range(head_dim))
        sizes = [math.sqrt(sum(float(x) ** 2 for x in keys[k])) + 1e-8 for k in (i, j)]
        return dot / (sizes[0] * sizes[1])

    mean = [sum(cosine(i, j) for i in range(count) if i != j) / count for j in range(count)]
    assert mean[3] == 0
    total = sum(map(math.exp, mean))
    expected = [
        attention_weight * float(attention[j]) - (1 - attention_weight) * math.exp(mean[j]) / total
        for j in range(count)
    ]
    scores = policies.rkv_scores(attention, keys, attention_weight)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("attention_weight", "kept"), [(1.0, [0, 2]), (0.5, [0, 3])])
def test_rkv_by_hand(attention_weight: float, kept: list[int]) -> None:
    """Three parallel keys and one across: s is 0.277 for the parallel ones and 0.168 for it."""
    candidates = by_hand(
        [0.3, 0.19, 0.26, 0.25],
        keep=2,
        keys=[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]],
        values=VALUES[:4],
    )
    assert sorted(policies.rkv(attention_weight)(candidates).tolist()) == kept


def test_cur_by_hand() -> None:
    candidates = by_hand(
        [0.0] * 4,
        keep=2,
        keys=[[0.0, 9.0], [1.0, 9.0], [2.0, 9.0], [3.0, 9.0]],
        values=[[1.0, 0.0], [6.0, 0.0], [2.0, 0.0], [1.0, 9.0]],
    )
    matrices = [FIRST_CHANNEL, SECOND_CHANNEL, torch.eye(2), torch.tensor([[3.0, 3.0], [0.1, 0.1]])]
    policy = policies.cur(lambda c: matrices[c.eviction_index])
    # The products are 0, 36, 16, 9, then 0, 0, 0, 81 * 81, then 81, 82 * 36, 85 * 4, 90 * 82; the
    # last sketch is nearly the first one.
    for index, kept in enumerate([[0, 1], [0, 3], [0, 3], [0, 1]]):
        chosen = policy(replace(candidates, eviction_index=index))
        assert sorted(chosen.tolist()) == kept


# By which law


def counts_of_sets(policy: Selector, candidates: Candidates) -> Counter[tuple[int, ...]]:
    return Counter(tuple(sorted(policy(candidates).tolist())) for _ in range(DRAWS))


def test_random_takes_every_set_alike() -> None:
    counts = counts_of_sets(policies.uniform(generator(0)), by_hand(ATTENTION, keep=3))
    law = {(0, *pair): 1 / 6 for pair in itertools.combinations(range(1, 5), 2)}
    assert chi_square_of_sets(counts, law) > 0.001


def test_random_protection_then_the_largest_scores() -> None:
    policy = Ranking(policies.protect_at_random(generator(0)))
    counts = counts_of_sets(policy, by_hand(ATTENTION, keep=3))
    # One of 1 to 4 is protected, and then 4 has the largest score, or 1 if 4 is protected.
    law = {(0, 1, 4): 1 / 2, (0, 2, 4): 1 / 4, (0, 3, 4): 1 / 4}
    assert chi_square_of_sets(counts, law) > 0.001


def test_random_protection_then_a_draw() -> None:
    policy = Drawing(policies.protect_at_random(generator(0)), generator(1))
    counts = counts_of_sets(policy, by_hand(ATTENTION, keep=3))
    law: Counter[tuple[int, ...]] = Counter()
    for protected in range(1, 5):
        rest = [j for j in range(1, 5) if j != protected]
        for (drawn,), probability in set_probabilities([ATTENTION[j] for j in rest], 1).items():
            law[tuple(sorted((0, protected, rest[drawn])))] += probability / 4
    assert chi_square_of_sets(counts, law) > 0.001


def test_without_protection_all_but_the_sinks_are_drawn() -> None:
    counts = counts_of_sets(
        Drawing(policies.protect_sinks, generator(0)), by_hand(ATTENTION, keep=3)
    )
    law = {
        (0, *(j + 1 for j in drawn)): probability
        for drawn, probability in set_probabilities(ATTENTION[1:], 2).items()
    }
    assert chi_square_of_sets(counts, law) > 0.001


# How clearly


def test_margins_are_those_of_the_policys_own_cuts() -> None:
    candidates = by_hand(ATTENTION, keep=3)
    assert policies.snapkv().margins(candidates) == pytest.approx((INF, 1 / 3))
    # 12 and 127 / 12, then of the rest 0.4 and 0.2.
    assert policies.vase_greedy("variance").margins(candidates) == pytest.approx((17 / 144, 0.5))
    # Of 0, 1, 6 and 6.5 the first two stay.
    assert policies.evict_large().margins(candidates) == pytest.approx((INF, 5 / 6))
    assert policies.streaming().margins(candidates) == pytest.approx((INF, 1 / 3))
    everything_is_kept = by_hand(ATTENTION, keep=5)
    assert policies.snapkv().margins(everything_is_kept) == (INF, INF)


def test_a_difference_near_0_is_no_clear_cut() -> None:
    """With keys all alike R-KV's scores are 0.5 * (a - 0.25): here 0.025, 5e-8, 0 and -0.025."""
    candidates = by_hand([0.3, 0.2500001, 0.25, 0.2], keep=2, values=VALUES[:4])
    _, margin = policies.rkv().margins(candidates)
    assert 0 < margin < 1e-6
    assert policies.rkv().margins(replace(candidates, keep=3))[1] > 0.05


# In the decoder


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedModel:
    return make_model("qwen3")


def test_streaming_keeps_the_ends_of_the_sequence(qwen3: PreTrainedModel) -> None:
    policy = policies.streaming()
    result = generate_with_eviction(
        qwen3, tokens(45), 60, **SMALL, sampling=policy, margins=policy.margins
    )
    assert len(result.evictions) >= 5
    assert result.margin > 1e-3
    recent = SMALL["budget"] - SMALL["sinks"]
    for eviction in result.evictions:
        newest = range(eviction.position - recent, eviction.position)
        for head in eviction.heads.values():
            assert head.after == (*range(SMALL["sinks"]), *newest)


def test_evictions_are_counted_and_margins_are_logged(qwen3: PreTrainedModel) -> None:
    seen: list[int] = []

    def spy(candidates: Candidates) -> torch.Tensor:
        seen.append(candidates.eviction_index)
        return policies.snapkv()(candidates)

    decoder = EvictingDecoder(qwen3, Settings(**SMALL), spy, margins=lambda c: (c.step, c.layer))
    decoder.prefill(tokens(20))
    for token in tokens(40):
        decoder.step(token)
    assert seen == [index for index in range(4) for _ in range(4)]  # 2 layers of 2 KV heads
    for eviction in decoder.evictions:
        for (layer, _), head in eviction.heads.items():
            assert (head.range_margin, head.score_margin) == (eviction.position, layer)
