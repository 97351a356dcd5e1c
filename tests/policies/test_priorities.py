"""The policies' priorities on dense tensors: against the oracle, in law, and what must hold."""

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.oracle import policies
from tests.oracle.law import chi_square_of_sets, set_probabilities
from tests.oracle.policies import Ranking
from tests.oracle.selection import Candidates as OracleCandidates
from tests.support.dense_eviction import DenseEviction
from tests.support.query_statistics import query_means, statistics_file
from vase_vllm.config import EvictionConfig
from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.kernels.torch_distinctness import similarity_to
from vase_vllm.kernels.torch_eviction import value_range
from vase_vllm.worker.evictor import TorchEvictor


def means_of(candidates: OracleCandidates) -> policies.QueryMeans:
    """The statistics that the policy triattention has in these tests."""
    group, _, head_size = candidates.queries.shape
    return query_means(candidates.layer, candidates.kv_head, group, head_size)


GREEDY = {"policy": "vase", "sampling": "greedy"}
TRIATTENTION = {"policy": "triattention", "statistics": statistics_file(2, 16)}
RANKINGS = {
    "snapkv": ({"policy": "snapkv"}, policies.snapkv()),
    "rkv": ({"policy": "rkv"}, policies.rkv(0.5)),
    "rkv-attention": ({"policy": "rkv", "lambda": 0.875}, policies.rkv(0.875)),
    "rkv-keys": ({"policy": "rkv", "lambda": 0.0}, policies.rkv(0.0)),
    "streaming": ({"policy": "streaming"}, policies.streaming()),
    "expected": ({"policy": "expected"}, policies.expected()),
    "expected-attention": (
        {"policy": "expected", "value_norm": False},
        policies.expected(value_norm=False),
    ),
    "triattention": (TRIATTENTION, policies.triattention(means_of)),
    "triattention-mean": (
        {**TRIATTENTION, "longest_offset": 100, "aggregation": "mean"},
        policies.triattention(means_of, 100, "mean"),
    ),
    "h2o": ({"policy": "h2o", "recent": 4}, policies.h2o(4)),
    "h2o-heavy-hitters": ({"policy": "h2o", "recent": 0}, policies.h2o(0)),
    "distinct": ({"policy": "distinct"}, policies.distinct(0.1)),
    "distinct-remembers": (
        {"policy": "distinct", "smoothing": 1, "temperature": 1.0, "memory": 0.5},
        policies.distinct(0.1, remembers=True),
    ),
    "distinct-strata": (
        {"policy": "distinct", "strata": 3},
        policies.Stratified(policies.distinct(0.1).view, 3),
    ),
    "distinct-ridge": ({"policy": "distinct", "ridge": 2.0}, policies.distinct(2.0)),
    "vase-range": (GREEDY, policies.vase_greedy("range")),
    "vase-variance": ({**GREEDY, "magnitude": "variance"}, policies.vase_greedy("variance")),
    "vase-l2": ({**GREEDY, "magnitude": "l2"}, policies.vase_greedy("l2")),
    "vase-no-magnitude": ({**GREEDY, "magnitude": "none"}, Ranking(policies.protect_sinks)),
    "vase-no-protection": ({**GREEDY, "protect": "none"}, Ranking(policies.protect_sinks)),
    **{
        f"vase-evict-large-{magnitude}": (
            {"policy": "vase", "evict_large": True, "magnitude": magnitude},
            policies.evict_large(magnitude),
        )
        for magnitude in ("range", "variance", "l2")
    },
}
DRAWN = {
    "random": {"policy": "random"},
    "vase": {"policy": "vase"},
    "vase-no-protection-drawn": {"policy": "vase", "protect": "none"},
    "vase-random-protection": {"policy": "vase", "protect": "random"},
    "vase-random-protection-greedy": {**GREEDY, "protect": "random"},
}
CUR = {
    "cur-fixed": {"policy": "cur", "gaussian": "fixed", "columns": 3},
    "cur-redrawn": {"policy": "cur", "gaussian": "redrawn", "columns": 3},
}
ALL = {name: own for name, (own, _) in RANKINGS.items()} | DRAWN | CUR
HAS_ATTENTION = {"snapkv", "rkv", "vase", "distinct"}
HAS_PROTECTION = {"vase", "distinct"}
RANKED_BY_AGE = {"streaming", "h2o", "distinct-strata"}
EXAMPLES = settings(max_examples=30, deadline=None)


class Shape(NamedTuple):
    """Of one eviction; lengths in tokens."""

    window: int
    keep: int
    sinks: int
    protected: int
    num_candidates: int
    num_heads: int
    group: int
    head_size: int
    seed: int
    smoothing: int
    temperature: float

    def eviction(self, own: dict[str, Any], num_distinct: int | None = None) -> DenseEviction:
        """A random one of this shape, under a policy's own settings."""
        common = {"budget": self.keep + self.window, "window": self.window, "sinks": self.sinks}
        if own["policy"] in HAS_ATTENTION:
            common |= {"smoothing": self.smoothing, "temperature": self.temperature}
        if own["policy"] in HAS_PROTECTION:
            common["protected"] = self.protected
        assume(own.get("recent", 0) + self.sinks <= common["budget"])
        assume(own.get("strata", 1) <= self.window)
        if own["policy"] == "triattention":
            own = own | {"statistics": statistics_file(self.group, self.head_size)}
        return DenseEviction.random(
            common | own,
            self.num_candidates,
            num_heads=self.num_heads,
            group=self.group,
            head_size=self.head_size,
            seed=self.seed,
            num_distinct=num_distinct,
        )


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    window, keep = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    sinks = draw(st.integers(0, min(3, keep)))
    return Shape(
        window=window,
        keep=keep,
        sinks=sinks,
        protected=draw(st.integers(sinks, keep)),
        num_candidates=keep + window * draw(st.integers(1, 4)),
        num_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        head_size=draw(st.sampled_from([4, 16])),
        seed=draw(st.integers(0, 1000)),
        smoothing=draw(st.sampled_from([1, 3, 5])),
        temperature=draw(st.sampled_from([0.5, 1.0, 2.0])),
    )


# Against the oracle


def assert_equal_to_oracle(eviction: DenseEviction, shape: Shape, policy: Ranking) -> None:
    for head, kept in enumerate(eviction.kept()):
        candidates = eviction.oracle(
            head,
            protected=shape.protected,
            smoothing=shape.smoothing,
            temperature=shape.temperature,
        )
        assume(min(policy.margins(candidates)) > 1e-5)
        assert kept == tuple(sorted(policy(candidates).tolist()))


@pytest.mark.parametrize(("own", "policy"), RANKINGS.values(), ids=RANKINGS)
@EXAMPLES
@given(shape=shapes())
def test_survivors_are_those_of_the_oracle(own, policy, shape):
    assert_equal_to_oracle(shape.eviction(own), shape, policy)


@pytest.mark.parametrize("own", CUR.values(), ids=CUR)
@EXAMPLES
@given(shape=shapes())
def test_cur_keeps_the_leverage_that_its_matrix_gives(own, shape):
    eviction = shape.eviction(own)
    draws = eviction.candidates().draws
    sketch, *others = draws.gaussian(shape.head_size, own["columns"], own["gaussian"] == "redrawn")
    assert all(torch.equal(sketch, other) for other in others)
    assert_equal_to_oracle(eviction, shape, policies.cur(lambda _: sketch))


def test_a_key_of_zeros_is_similar_to_nothing():
    eviction = DenseEviction.random({"policy": "rkv", "budget": 12, "window": 4, "sinks": 1}, 12)
    eviction.keys[:, 5] = 0
    for head, priority in enumerate(eviction.priority()):
        attention = eviction.oracle(head, smoothing=5).scores
        expected = policies.rkv_scores(attention, eviction.keys[head], 0.5)
        torch.testing.assert_close(priority[1:], expected[1:], atol=1e-6, rtol=1e-5)


def test_a_window_value_that_is_not_finite_is_left_out_of_the_comparison():
    settings = {"policy": "distinct", "budget": 20, "window": 8, "sinks": 0, "protected": 6}
    eviction = DenseEviction.random(settings, 24)
    eviction.window_values[:, 3] = 0
    without = eviction.priority()
    for number in (torch.nan, torch.inf, 3e38):
        eviction.window_values[:, 3, 2] = number
        assert torch.equal(eviction.priority(), without)
    eviction.window_values[:] = torch.nan
    keys, window_keys = eviction.keys.transpose(-1, -2), eviction.window_keys.transpose(-1, -2)
    unlike = 1 - similarity_to(window_keys, keys)
    scores = unlike * value_range(eviction.values) * eviction.values.norm(dim=-1)
    expected = scores >= scores.topk(6).values[:, -1:]
    assert torch.equal(eviction.priority().isinf(), expected)
    assert not torch.equal(expected, without.isinf())


def test_the_fused_kernel_takes_distinct():
    settings = {"policy": "distinct", "budget": 64, "window": 16, "ridge": 0.5, "smoothing": 3}
    config = EvictionConfig.parse(settings)
    assert config.fused == EvictionParameters(
        64, 16, 32, smoothing=3, sampling="greedy", protect_by="distinctness", ridge=0.5
    )
    # Beside a kept prompt of 30 tokens as many are protected as beside 4 sinks.
    of_sequence = config.policy.fused(config.limits_of(budget=64 + 30, kept=30))
    assert of_sequence.counts == (94, 30, 30 + 28)
    remembering = EvictionConfig.parse(settings | {"smoothing": 1, "memory": 0.5}).fused
    assert remembering == replace(config.fused, smoothing=1, memory=0.5)
    divided = EvictionConfig.parse(settings | {"strata": 4}).fused
    assert divided == replace(config.fused, strata=4)


# What must hold


@pytest.mark.parametrize("own", ALL.values(), ids=ALL)
@EXAMPLES
@given(shape=shapes(), ties=st.booleans())
def test_as_many_survive_as_shall_and_the_sinks_are_among_them(own, shape, ties):
    """Tokens that repeat tie in every score, and the lower slot goes first."""
    eviction = shape.eviction(own, num_distinct=(shape.num_candidates + 1) // 2 if ties else None)
    evictor = TorchEvictor(eviction.config, None, None, None, 1.0, None)
    mask, _ = evictor.survivors(eviction.candidates())
    assert mask.sum(dim=-1).tolist() == [shape.keep] * shape.num_heads
    assert mask[:, : shape.sinks].all()
    assert [tuple(row.nonzero().flatten().tolist()) for row in mask] == eviction.kept()


@pytest.mark.parametrize("own", ALL.values(), ids=ALL)
@EXAMPLES
@given(
    shape=shapes(),
    what=st.sampled_from(["keys", "values", "queries", "window_keys", "window_values"]),
    number=st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38]),
    which=st.integers(0, 100),
)
def test_as_many_survive_where_numbers_are_nan_or_infinite(own, shape, what, number, which):
    """As activations of fp16 models become that overflow; the sinks are among the survivors."""
    eviction = shape.eviction(own)
    tokens = getattr(eviction, what)
    tokens[:, which % tokens.shape[1]] = number
    evictor = TorchEvictor(eviction.config, None, None, None, 1.0, None)
    mask, _ = evictor.survivors(eviction.candidates())
    assert mask.sum(dim=-1).tolist() == [shape.keep] * shape.num_heads
    assert mask[:, : shape.sinks].all()


def test_broken_numbers_are_warned_of_once_per_request(monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(
        "vase_vllm.worker.nan_warnings.logger.warning",
        lambda text, *args: warnings.append(text % args),
    )
    settings = {"policy": "vase", "budget": 12, "window": 4, "sinks": 1}
    good, bad = (DenseEviction.random(settings, 12) for _ in range(2))
    bad.keys[:, 5] = torch.nan
    evictor = TorchEvictor(bad.config, None, None, None, 1.0, None)
    evictor.survivors(good.candidates(key=1))
    for key, layer in ((2, 0), (2, 1), (3, 0)):
        evictor.survivors(bad.candidates(key=key, layer=layer))
    assert not warnings, "a device may not have got that far"
    evictor.nan_warnings.poll()
    assert len(warnings) == 2
    assert "NaN (content key 2, first eviction at" in warnings[0]
    assert "content key 3" in warnings[1]


@pytest.mark.parametrize("own", ALL.values(), ids=ALL)
@EXAMPLES
@given(shape=shapes(), key=st.integers(0, 2**31 - 1), eviction_index=st.integers(0, 1000))
def test_the_same_eviction_twice_is_the_same(own, shape, key, eviction_index):
    which = {"key": key, "eviction_index": eviction_index, "layer": 3}
    first, second = (shape.eviction(own).priority(**which) for _ in range(2))
    assert not first.isnan().any()
    assert torch.equal(first, second)


@pytest.mark.parametrize("own", ALL.values(), ids=ALL)
@EXAMPLES
@given(shape=shapes())
def test_a_head_alone_ranks_as_it_does_among_others(own, shape):
    """As it is on another rank of tensor parallelism."""
    eviction = shape.eviction(own)
    together = eviction.priority()
    for head in range(shape.num_heads):
        alone = eviction.head(head).priority(first_head=head)
        torch.testing.assert_close(alone[0], together[head], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [*(name for name in RANKINGS if name not in RANKED_BY_AGE), *CUR], ids=str
)
@EXAMPLES
@given(shape=shapes(), data=st.data())
def test_the_order_of_the_slots_does_not_matter(name, shape, data):
    """Without smoothing, that is; and the sinks are the first slots always."""
    eviction = shape._replace(smoothing=1).eviction(ALL[name])
    others = data.draw(st.permutations(range(shape.sinks, shape.num_candidates)))
    order = torch.tensor([*range(shape.sinks), *others])
    torch.testing.assert_close(
        eviction.permuted(order).priority(), eviction.priority()[:, order], atol=1e-5, rtol=1e-5
    )


LARGE = {"budget": 64, "window": 16, "sinks": 4}
NO_DRAWS = {
    "streaming": {"eviction_index"},
    "triattention": {"eviction_index", "layer", "first_head"},
}
"""What these policies rank by, without a draw."""


@pytest.mark.parametrize("change", ["key", "eviction_index", "layer", "first_head", "seed"])
@pytest.mark.parametrize("name", ALL)
def test_draws_belong_to_request_eviction_layer_head_and_seed(name, change):
    own = ALL[name]
    seed, which = (1, {}) if change == "seed" else (0, {change: 7})
    before = DenseEviction.random(LARGE | own, 96).priority()
    after = DenseEviction.random(LARGE | own | {"seed": seed}, 96).priority(**which)
    if name in CUR:  # one matrix for all heads of a layer
        draws_anew = change != "first_head" and (name, change) != ("cur-fixed", "eviction_index")
    elif change in NO_DRAWS.get(own["policy"], ()):
        return
    else:
        draws_anew = name in DRAWN
    assert torch.equal(before, after) != draws_anew


def test_streaming_gives_the_fused_kernel_its_own_ranking():
    """Row for row, whatever the others have; a row that never evicts stays empty."""
    settings = {"policy": "streaming", "budget": 24, "window": 8, "sinks": 2}
    config = EvictionConfig.parse(settings)
    # First eviction, evictions before, candidates.
    sequences = [(32, 0, 24), (0, 0, 0), (104, 0, 96), (32, 1, 24), (104, 3, 24), (32, 40, 24)]
    first, eviction_index, _ = np.array(sequences).T
    rows = config.policy.slot_priority([config.limits] * 6, first, eviction_index, 96)
    assert rows.shape == (6, 96)
    assert rows.dtype == np.int32
    for row, (first_eviction, index, count) in zip(rows, sequences, strict=True):
        assert not row[count:].any()
        if first_eviction:
            tokens = DenseEviction.random(settings, count).candidates(eviction_index=index)
            priority = config.policy.priority(replace(tokens, first=first_eviction))
            assert (priority == torch.from_numpy(row[:count])).all()


@pytest.mark.parametrize("name", [name for name in ALL if name != "streaming"])
def test_other_policies_give_the_fused_kernel_no_ranking(name):
    config = EvictionConfig.parse(LARGE | ALL[name])
    first, eviction_index = np.array([80]), np.array([0])
    assert config.policy.slot_priority([config.limits], first, eviction_index, 64) is None


# In law

SMALL = {"budget": 6, "window": 2, "sinks": 1}
NUM_CANDIDATES = 8
P_VALUE = 1e-3
Law = dict[tuple[int, ...], float]


def drawn_sets(eviction: DenseEviction) -> Counter[tuple[int, ...]]:
    """Sets that survive, over heads with the same tokens, requests and evictions."""
    heads = eviction.repeated(256)
    counts: Counter[tuple[int, ...]] = Counter()
    for key, eviction_index in itertools.product(range(4), range(4)):
        counts.update(heads.kept(key=key, eviction_index=eviction_index, layer=2))
    return counts


def law_after(protected: tuple[int, ...], weights: torch.Tensor, keep: int) -> Law:
    """What is protected, and the rest drawn in proportion to the weights."""
    rest = [j for j in range(len(weights)) if j not in protected]
    law = set_probabilities(weights[rest].tolist(), keep - len(protected))
    return {
        tuple(sorted((*protected, *(rest[i] for i in drawn)))): probability
        for drawn, probability in law.items()
    }


def mixture(laws: list[Law]) -> Law:
    """All of them equally likely."""
    total: Counter[tuple[int, ...]] = Counter()
    for law in laws:
        for kept, probability in law.items():
            total[kept] += probability / len(laws)
    return dict(total)


def test_random_draws_every_set_alike():
    counts = drawn_sets(DenseEviction.random(SMALL | {"policy": "random"}, NUM_CANDIDATES))
    law = law_after((0,), torch.ones(NUM_CANDIDATES), keep=4)
    assert len(law) == 35
    assert len(set(law.values())) == 1
    assert chi_square_of_sets(counts, law) > P_VALUE


@pytest.mark.parametrize("smoothing", [1, 3])
@pytest.mark.parametrize("own", [{"protect": "none"}, {"magnitude": "none"}], ids=str)
def test_without_protection_all_but_the_sinks_are_drawn_by_attention(own, smoothing):
    own = {"policy": "vase", "smoothing": smoothing, "temperature": 0.5, "protected": 3} | own
    eviction = DenseEviction.random(SMALL | own, NUM_CANDIDATES)
    weights = eviction.oracle(0, smoothing=smoothing, temperature=0.5).scores
    assert chi_square_of_sets(drawn_sets(eviction), law_after((0,), weights, keep=4)) > P_VALUE
    uniform = law_after((0,), torch.ones(NUM_CANDIDATES), keep=4)
    assert chi_square_of_sets(drawn_sets(eviction), uniform) < 1e-6, "attention is flat here"


@pytest.mark.parametrize("magnitude", ["range", "variance", "l2"])
def test_the_largest_magnitudes_are_protected_and_the_rest_is_drawn(magnitude):
    own = {"policy": "vase", "smoothing": 1, "protected": 2, "magnitude": magnitude}
    eviction = DenseEviction.random(SMALL | own, NUM_CANDIDATES)
    magnitudes = policies.value_magnitudes(eviction.values[0, 1:], magnitude)
    protected = (0, 1 + int(magnitudes.argmax()))
    law = law_after(protected, eviction.oracle(0).scores, keep=4)
    assert chi_square_of_sets(drawn_sets(eviction), law) > P_VALUE


@pytest.mark.parametrize("protected", [1, 2, 3])
def test_random_protection_then_a_draw(protected):
    """The two draws must be independent of each other."""
    own = {"policy": "vase", "smoothing": 1, "protect": "random", "protected": protected}
    eviction = DenseEviction.random(SMALL | own, NUM_CANDIDATES)
    weights = eviction.oracle(0).scores
    others = itertools.combinations(range(1, NUM_CANDIDATES), protected - 1)
    law = mixture([law_after((0, *chosen), weights, keep=4) for chosen in others])
    assert chi_square_of_sets(drawn_sets(eviction), law) > P_VALUE


def test_random_protection_then_the_largest_attention():
    own = {**GREEDY, "smoothing": 1, "protect": "random", "protected": 3}
    eviction = DenseEviction.random(SMALL | own, NUM_CANDIDATES)
    scores = eviction.oracle(0).scores.tolist()
    laws = []
    for chosen in itertools.combinations(range(1, NUM_CANDIDATES), 2):
        rest = [j for j in range(1, NUM_CANDIDATES) if j not in chosen]
        laws.append({tuple(sorted((0, *chosen, max(rest, key=scores.__getitem__)))): 1.0})
    assert chi_square_of_sets(drawn_sets(eviction), mixture(laws)) > P_VALUE


@pytest.mark.parametrize("over", ["key", "eviction_index", "layer"])
def test_the_matrices_of_cur_are_gaussian(over):
    """What survives under them, against matrices from torch's own generator."""
    own = {"policy": "cur", "gaussian": "redrawn", "columns": 2}
    eviction = DenseEviction.random(SMALL | own, 7, num_heads=1, head_size=8)
    counts = Counter(eviction.kept(**{over: value})[0] for value in range(2000))

    sketches = torch.randn(200_000, 8, 2, generator=torch.Generator().manual_seed(0))
    key_leverage, value_leverage = (
        torch.einsum("nd,sdc->snc", rows[0, 1:], sketches).square().sum(dim=-1)
        for rows in (eviction.keys, eviction.values)
    )
    best = (key_leverage * value_leverage).topk(3).indices.sort(dim=-1).values + 1
    expected = Counter((0, *kept) for kept in map(tuple, best.tolist()))
    law = {kept: count / len(sketches) for kept, count in expected.items()}
    assert len(law) > 10
    assert chi_square_of_sets(counts, law) > P_VALUE


def test_the_cells_of_the_matrix_of_cur_are_independent_normal_numbers():
    eviction = DenseEviction.random(SMALL | CUR["cur-fixed"], NUM_CANDIDATES)
    cells = torch.stack(
        [
            eviction.candidates(key=key).draws.gaussian(16, 20, False)[0].flatten()
            for key in range(500)
        ]
    )  # [requests, 320]
    cells = cells.double()
    # Kolmogorov-Smirnov: the distance of n numbers is above 1.95 / sqrt(n) once in a thousand.
    cdf = torch.special.ndtr(cells.flatten().sort().values)
    ranks = (torch.arange(cells.numel()) + 0.5) / cells.numel()
    assert (cdf - ranks).abs().max() < 1.95 / cells.numel() ** 0.5
    # Correlations of cells over requests, and of their sizes: normal too, of deviation 1 / sqrt(m).
    for numbers in (cells, cells.abs()):
        correlation = torch.corrcoef(numbers.T)
        pairs = correlation[torch.triu(torch.ones_like(correlation), diagonal=1).bool()]
        assert pairs.abs().max() < 6 / len(cells) ** 0.5
        assert abs(pairs.std() * len(cells) ** 0.5 - 1) < 0.05
