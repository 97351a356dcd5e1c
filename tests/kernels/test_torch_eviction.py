"""Invariants and laws of one eviction on dense tensors."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle.law import chi_square_of_sets, set_probabilities
from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.kernels.torch_eviction import (
    attention_scores,
    largest,
    plan_moves,
    sampling_noise,
    select_survivors,
    value_range,
)


@st.composite
def evictions(draw):
    """(parameters, scores [H, n], ranges [H, n]), with plenty of ties."""
    window = draw(st.integers(1, 6))
    num_kept = draw(st.integers(1, 12))
    protected = draw(st.integers(0, num_kept))
    parameters = EvictionParameters(
        budget=num_kept + window,
        window=window,
        protected=protected,
        sinks=draw(st.integers(0, protected)),
        sampling=draw(st.sampled_from(["gumbel", "greedy"])),
    )
    num_candidates = parameters.budget + draw(st.integers(0, 15))
    levels = draw(st.sampled_from([1, 2, 1000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 3)), num_candidates)
    scores = torch.randint(0, levels, shape, generator=generator) / levels
    ranges = torch.randint(0, levels, shape, generator=generator).float()
    return parameters, scores, ranges


def noise_for(parameters, scores):
    if parameters.sampling == "greedy":
        return None
    heads = torch.arange(scores.shape[0])
    return sampling_noise(parameters.seed, scores.shape[1], 3, 1, heads, 99)


@given(evictions())
def test_counts_sinks_and_protected(eviction):
    parameters, scores, ranges = eviction
    keep = select_survivors(parameters, scores, ranges, noise_for(parameters, scores))
    assert (keep.sum(-1) == parameters.budget - parameters.window).all()
    assert keep[:, : parameters.sinks].all()
    ranges = ranges.clone()
    ranges[:, : parameters.sinks] = torch.inf
    for head in range(len(ranges)):
        by_range = sorted(range(ranges.shape[1]), key=lambda j: (-ranges[head, j], j))
        assert keep[head, by_range[: parameters.protected]].all()


@given(evictions())
def test_greedy_keeps_the_largest_scores_of_the_rest(eviction):
    parameters, scores, ranges = eviction
    keep = select_survivors(parameters, scores, ranges, None)
    ranges = ranges.clone()
    ranges[:, : parameters.sinks] = torch.inf
    num_drawn = parameters.budget - parameters.window - parameters.protected
    for head in range(len(ranges)):
        by_range = sorted(range(ranges.shape[1]), key=lambda j: (-ranges[head, j], j))
        protected, rest = by_range[: parameters.protected], by_range[parameters.protected :]
        drawn = sorted(rest, key=lambda j: (-scores[head, j], j))[:num_drawn]
        assert set(keep[head].nonzero().flatten().tolist()) == {*protected, *drawn}


@given(evictions())
def test_moves_fill_every_freed_slot_once(eviction):
    parameters, scores, ranges = eviction
    keep = select_survivors(parameters, scores, ranges, noise_for(parameters, scores))
    head, source, destination = plan_moves(parameters.budget, parameters.window, keep)
    num_cached = scores.shape[1] + parameters.window
    for h in range(len(keep)):
        survivors = {*keep[h].nonzero().flatten().tolist()}
        survivors |= {*range(scores.shape[1], num_cached)}
        own = (head == h) & (source != destination)
        moved, freed = source[own].tolist(), destination[own].tolist()
        stays = set(source[(head == h) & (source == destination)].tolist())
        assert stays == set(range(parameters.budget, num_cached)) - survivors
        stay = {slot for slot in survivors if slot < parameters.budget}
        assert set(moved) == survivors - stay
        assert set(freed) == set(range(parameters.budget)) - stay
        assert len(set(freed)) == len(freed)
        assert moved == sorted(moved)


def test_scores_are_the_formula():
    torch.manual_seed(0)
    num_heads, group, window, head_size, n, smoothing, scale = 2, 3, 5, 8, 17, 5, 0.3
    queries = torch.randn(num_heads, window, group, head_size)
    keys = torch.randn(num_heads, n, head_size)
    got = attention_scores(
        queries.flatten(1, 2), keys.transpose(1, 2).contiguous(), scale, smoothing
    )
    logits = torch.einsum("hwgd,hnd->hgwn", queries.double(), keys.double()) * scale
    mean = logits.softmax(-1).mean(2)
    padded = torch.nn.functional.pad(mean, (2, 2))
    smooth = sum(padded[..., i : i + n] for i in range(smoothing)) / smoothing
    torch.testing.assert_close(got, smooth.mean(1).float(), rtol=1e-5, atol=1e-7)


def test_value_range():
    values = torch.tensor([[1.0, -2.0, 0.5], [3.0, 3.0, 3.0]], dtype=torch.bfloat16)
    assert value_range(values).tolist() == [3.0, 0.0]


@pytest.mark.parametrize("skew", [1.0, 3.0], ids=["mild", "steep"])
def test_draws_follow_the_law_without_replacement(skew):
    """Sets of survivors against the exact law; one that drew otherwise would fail by far."""
    parameters = EvictionParameters(budget=6, window=1, protected=2, sinks=1, sampling="gumbel")
    scores = torch.tensor([[5.0, 1.0, 2.0, 3.0, 4.0, 0.5, 1.5, 2.5]]) ** skew
    ranges = torch.tensor([[0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0]])
    rest = [1, 2, 4, 5, 6, 7]
    observed: Counter[tuple[int, ...]] = Counter()
    for key in range(6000):
        noise = sampling_noise(parameters.seed, 8, key % 7, key % 5, torch.tensor([key % 3]), key)
        keep = select_survivors(parameters, scores, ranges, noise)[0]
        kept = frozenset(keep.nonzero().flatten().tolist())
        assert {0, 3} <= kept
        observed[tuple(sorted(rest.index(j) for j in kept - {0, 3}))] += 1
    weights = scores[0, rest].tolist()
    assert chi_square_of_sets(observed, set_probabilities(weights, 3)) > 1e-3
    wrong = set_probabilities([weight**2 for weight in weights], 3)
    assert chi_square_of_sets(observed, wrong) < 1e-6


settings.register_profile("vase", deadline=None, max_examples=100)
settings.load_profile("vase")


@given(st.data())
def test_the_largest_are_as_many_as_asked_for_whatever_the_numbers(data):
    """NaN and infinities too: NaN ranks with -inf, and ties go to the lower index."""
    numbers = st.lists(st.floats(width=32), min_size=1, max_size=30)
    values = torch.tensor([data.draw(numbers)])
    count = data.draw(st.integers(0, values.shape[1]))
    keep = largest(values, count)
    assert keep.sum() == count
    ranked = values.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[0]
    assert keep[0].nonzero().flatten().tolist() == sorted(order[:count].tolist())
