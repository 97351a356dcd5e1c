"""The law of the draws, against brute force, and the power of the test against wrong laws."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch

from tests.oracle.law import chi_square_of_sets, inclusion_probabilities, set_probabilities

WEIGHTS = [0.02, 0.9, 0.3, 0.05, 0.6, 0.15]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_law_by_hand() -> None:
    first, second, third = 0.5, 0.3, 0.2
    expected = {
        (0, 1): first * second / (1 - first) + second * first / (1 - second),
        (0, 2): first * third / (1 - first) + third * first / (1 - third),
        (1, 2): second * third / (1 - second) + third * second / (1 - third),
    }
    for scale in (1, 40):
        law = set_probabilities([first * scale, second * scale, third * scale], 2)
        assert law == pytest.approx(expected)


@pytest.mark.parametrize("k", range(7))
def test_law_is_the_sum_over_all_orders(k: int) -> None:
    expected: Counter[tuple[int, ...]] = Counter()
    for order in itertools.permutations(range(6), k):
        probability, left = 1.0, sum(WEIGHTS)
        for i in order:
            probability *= WEIGHTS[i] / left
            left -= WEIGHTS[i]
        expected[tuple(sorted(order))] += probability
    law = set_probabilities(WEIGHTS, k)
    assert law == pytest.approx(dict(expected))
    assert sum(law.values()) == pytest.approx(1)
    inclusion = inclusion_probabilities(WEIGHTS, k)
    assert sum(inclusion) == pytest.approx(k)
    for i in range(6):
        assert inclusion[i] == pytest.approx(sum(p for s, p in law.items() if i in s))


def test_law_leaves_out_what_has_no_weight() -> None:
    assert set_probabilities([0.0, 1.0, 0.0, 3.0], 1) == {(1,): 0.25, (3,): 0.75}
    assert inclusion_probabilities([0.0, 1.0, 0.0, 3.0], 2) == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="cannot draw 3 of 2"):
        set_probabilities([0.0, 1.0, 0.0, 3.0], 3)


def test_inclusion_agrees_with_simulation() -> None:
    """Draws made in plain Python, one after the other."""
    rng, runs, k = random.Random(0), 20_000, 3
    counts = [0] * 6
    for _ in range(runs):
        left = list(range(6))
        for _ in range(k):
            item = rng.choices(left, [WEIGHTS[i] for i in left])[0]
            left.remove(item)
            counts[item] += 1
    for count, probability in zip(counts, inclusion_probabilities(WEIGHTS, k), strict=True):
        deviation = math.sqrt(probability * (1 - probability) / runs)
        assert abs(count / runs - probability) < 4 * deviation


def top_k_sets(keys: torch.Tensor, k: int) -> Counter[tuple[int, ...]]:
    """Counts of the sets of the k largest of every row of keys, [runs, n]."""
    return Counter(map(tuple, keys.topk(k).indices.sort().values.tolist()))


def gumbel_noise(runs: int, seed: int) -> torch.Tensor:
    """[runs, 6], float64."""
    uniform = torch.rand(runs, 6, dtype=torch.float64, generator=generator(seed))
    return -torch.log(-torch.log(uniform))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("way", ["gumbel_top_k", "torch_multinomial"])
def test_right_draws_pass(way: str, k: int) -> None:
    weights, runs = torch.tensor(WEIGHTS, dtype=torch.float64), 30_000
    if way == "gumbel_top_k":
        counts = top_k_sets(weights.log() + gumbel_noise(runs, k), k)
    else:
        drawn = torch.multinomial(weights.expand(runs, -1), k, generator=generator(k))
        counts = Counter(map(tuple, drawn.sort().values.tolist()))
    assert chi_square_of_sets(counts, set_probabilities(WEIGHTS, k)) > 0.001


@pytest.mark.parametrize("way", ["squared", "tempered", "uniform", "noise_twice", "independent"])
def test_wrong_draws_are_rejected(way: str) -> None:
    weights, runs, k = torch.tensor(WEIGHTS, dtype=torch.float64), 30_000, 3
    noise = gumbel_noise(runs, 0)
    if way == "independent":
        # Coins with the right probabilities of inclusion, of which only the sets of k are counted.
        inclusion = torch.tensor(inclusion_probabilities(WEIGHTS, k), dtype=torch.float64)
        coins = torch.rand(runs, 6, dtype=torch.float64, generator=generator(1)) < inclusion
        rows = [row.nonzero().flatten().tolist() for row in coins if row.sum() == k]
        counts = Counter(map(tuple, rows))
    else:
        logits = {
            "squared": 2 * weights.log(),
            "tempered": weights.log() / 1.15,
            "uniform": torch.zeros(6, dtype=torch.float64),
            "noise_twice": weights.log() + gumbel_noise(runs, 1),
        }[way]
        counts = top_k_sets(logits + noise, k)
    assert chi_square_of_sets(counts, set_probabilities(WEIGHTS, k)) < 1e-6


def test_chi_square_values() -> None:
    # One degree of freedom: (60 - 50)^2 / 50 * 2 = 4, and P(chi2_1 > 4) = erfc(sqrt(2)).
    p_value = chi_square_of_sets({(0,): 60, (1,): 40}, {(0,): 0.5, (1,): 0.5})
    assert p_value == pytest.approx(math.erfc(math.sqrt(2)))
    # Two degrees of freedom: 6 + 1.5 + 1.5 = 9, and P(chi2_2 > x) = exp(-x / 2).
    thirds = {(0,): 1 / 3, (1,): 1 / 3, (2,): 1 / 3}
    assert chi_square_of_sets({(0,): 36, (1,): 18, (2,): 18}, thirds) == pytest.approx(
        math.exp(-4.5)
    )
    assert chi_square_of_sets({(0,): 36, (3,): 1}, thirds) == 0
    # Expected 3, 3 and 94: the two rare sets are pooled, and one degree of freedom is left.
    rare = {(0,): 0.03, (1,): 0.03, (2,): 0.94}
    assert chi_square_of_sets({(0,): 6, (2,): 94}, rare) == 1
    with pytest.raises(ValueError, match="too few"):
        chi_square_of_sets({(0,): 2, (1,): 1}, thirds)
    with pytest.raises(ValueError, match="sum to"):
        chi_square_of_sets({(0,): 2, (1,): 1}, {(0,): 0.4, (1,): 0.5})
