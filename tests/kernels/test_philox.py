"""The generator against the known answers of its authors, and the noise made from it."""

import pytest
import torch

from vase_vllm.kernels.philox import gumbel, philox_word

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, first output word.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        0xD16CFE09,
    ),
]


@pytest.mark.parametrize(("counter", "key", "word"), KNOWN_ANSWERS, ids=["zero", "ones", "pi"])
def test_known_answers(counter, key, word):
    seed = key[1] << 32 | key[0]
    assert philox_word(seed, *map(torch.tensor, counter)).item() == word


def test_gumbel_noise_is_finite_and_has_the_right_law():
    n = 200_000
    zero = torch.tensor(0)
    noise = gumbel(7, torch.arange(n), zero, zero, zero).double()
    assert torch.isfinite(noise).all()
    # P(g <= x) = exp(-exp(-x)): the Kolmogorov-Smirnov distance of n draws is about 1 / sqrt(n).
    cdf = torch.exp(-torch.exp(-noise.sort().values))
    distance = (cdf - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / n**0.5


def test_every_counter_word_and_both_halves_of_the_seed_matter():
    base = philox_word(1, *(torch.tensor(5),) * 4)
    for word in range(4):
        counter = [torch.tensor(5)] * 4
        counter[word] = torch.tensor(6)
        assert philox_word(1, *counter) != base
    assert philox_word(2, *(torch.tensor(5),) * 4) != base
    assert philox_word(1 + (1 << 32), *(torch.tensor(5),) * 4) != base
