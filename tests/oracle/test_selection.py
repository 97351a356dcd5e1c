"""The selection of the oracle, against loops and by hand."""

import math
from collections import Counter

import pytest
import torch

from tests.oracle.law import chi_square_of_sets, set_probabilities
from tests.oracle.selection import (
    Candidates,
    Settings,
    attention_scores,
    draw_without_replacement,
    sampling_selector,
    select_greedy,
    selection_margins,
    value_ranges,
)

WEIGHTS = [0.02, 0.9, 0.3, 0.05, 0.6, 0.15]
SMALL = {"budget": 24, "window": 8, "protected": 6, "sinks": 3}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("smoothing", [1, 3, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_are_the_formula(smoothing: int, temperature: float) -> None:
    group, window, count, head_dim = 3, 5, 11, 8
    torch.manual_seed(0)
    queries, keys = torch.randn(group, window, head_dim), torch.randn(count, head_dim)
    expected = [0.0] * count
    for g in range(group):
        attention = [0.0] * count
        for w in range(window):
            terms = [
                math.exp(
                    sum(float(queries[g, w, d]) * float(keys[j, d]) for d in range(head_dim))
                    / (math.sqrt(head_dim) * temperature)
                )
                for j in range(count)
            ]
            for j in range(count):
                attention[j] += terms[j] / sum(terms) / window
        half = smoothing // 2
        for j in range(count):
            near = attention[max(0, j - half) : j + half + 1]
            expected[j] += sum(near) / smoothing / group
    scores = attention_scores(queries, keys, smoothing=smoothing, temperature=temperature)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_ranges_by_hand() -> None:
    values = torch.tensor([[9.0, -9.0], [1.0, 3.0], [-2.0, -2.0], [0.5, -4.0]])
    positions = torch.tensor([1, 2, 5, 9])
    assert value_ranges(values, positions, sinks=2).tolist() == [float("inf"), 2.0, 0.0, 4.5]
    assert value_ranges(values, positions, sinks=0).tolist() == [18.0, 2.0, 0.0, 4.5]


def by_hand(scores: list[float], ranges: list[float], protected: int, keep: int) -> Candidates:
    positions, nothing = torch.arange(len(scores)) * 3, torch.zeros(len(scores), 2)
    return Candidates(
        step=0,
        layer=0,
        kv_head=0,
        positions=positions,
        scores=torch.tensor(scores),
        ranges=torch.tensor(ranges),
        protected=protected,
        keep=keep,
        sinks=1,
        eviction_index=0,
        keys=nothing,
        values=nothing,
        queries=torch.empty(0, 0, 2),
        window_keys=torch.empty(0, 2),
        window_values=torch.empty(0, 2),
        received=torch.empty(0),
    )


@pytest.mark.parametrize(
    ("scores", "ranges", "protected", "keep", "kept"),
    [
        ([0.0, 0.1, 0.2, 0.3, 0.4], [float("inf"), 1.0, 9.0, 2.0, 3.0], 2, 4, [0, 2, 3, 4]),
        ([0.4, 0.3, 0.2, 0.1, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0], 2, 3, [0, 3, 4]),
        ([0.1, 0.4, 0.2, 0.3, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0], 0, 2, [1, 3]),
        ([0.1, 0.4, 0.2, 0.3, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0], 2, 2, [3, 4]),
        ([0.2, 0.2, 0.2, 0.2, 0.2], [1.0, 7.0, 7.0, 7.0, 1.0], 2, 4, [0, 1, 2, 3]),
    ],
    ids=["sinks_count", "protected_despite_score", "attention_only", "range_only", "ties_go_low"],
)
def test_greedy_selection_by_hand(
    scores: list[float], ranges: list[float], protected: int, keep: int, kept: list[int]
) -> None:
    chosen = select_greedy(by_hand(scores, ranges, protected, keep))
    assert sorted(chosen.tolist()) == kept


def test_margins_tell_how_clear_a_cut_is() -> None:
    scores, ranges = [0.5, 0.1, 0.2, 0.4, 0.4], [float("inf"), 8.0, 6.0, 3.0, 3.0]
    assert selection_margins(by_hand(scores, ranges, 2, 3)) == (0.25, 0.0)
    assert selection_margins(by_hand(scores, ranges, 3, 4)) == (0.5, 0.0)
    assert selection_margins(by_hand(scores, ranges, 1, 3)) == (float("inf"), 0.5)
    assert selection_margins(by_hand(scores, ranges, 0, 0)) == (float("inf"), float("inf"))
    assert selection_margins(by_hand([-1.0, -4.0], [0.0, 0.0], 0, 1)) == (float("inf"), 0.75)


def test_selection_draws_by_the_law_and_never_the_protected() -> None:
    scores, ranges = [0.3, *WEIGHTS, 0.2], [9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 8.0]
    select, candidates = sampling_selector(generator(0)), by_hand(scores, ranges, 2, 5)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(4000):
        chosen = set(select(candidates).tolist())
        assert chosen >= {0, 7}
        counts[tuple(sorted(i - 1 for i in chosen - {0, 7}))] += 1
    assert chi_square_of_sets(counts, set_probabilities(WEIGHTS, 3)) > 0.001


def test_weights_of_zero_are_drawn_last() -> None:
    weights = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.0])
    assert sorted(draw_without_replacement(weights, 2, generator(0)).tolist()) == [1, 3]
    assert draw_without_replacement(weights, 4, generator(0)).tolist()[2:] == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window"),
        ({"sinks": 7}, "sinks"),
        ({"budget": 13}, "budget=13"),
        ({"smoothing": 4}, "smoothing"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**(SMALL | change))
