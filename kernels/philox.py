"""Counter-based random numbers: Philox4x32-10 in plain torch.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A draw is a pure function
of (seed, counter): it does not depend on the batch, on the order of the launches or on the device,
and the Triton kernel computes the same bits.
"""

import torch

_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox_word(
    seed: int, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> torch.Tensor:
    """First output word of Philox4x32-10.

    >>> zero = torch.tensor(0)
    >>> hex(philox_word(0, zero, zero, zero, zero).item())  # a known answer of the authors
    '0x6627e8d5'

    Args:
        seed: 64-bit key.
        c0, c1, c2, c3: int64 tensors that broadcast; each counter word in [0, 2**32).

    Returns:
        int64 tensor of the broadcast shape, values in [0, 2**32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    # Words broadcast when they meet: two rounds pass until each depends on all four.
    for _ in range(_ROUNDS - 1):
        # The product of two 32-bit words fills all 64 bits: int64 wraps, the bits are right. Only
        # factors must be 32-bit words: the low halves are masked where they become a part of one.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = _new_word(product_b, c1, k0), _new_word(product_a, c3, k1)
        c1, c3 = product_b, product_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return _new_word(c2 * _ROUND_B, c1, k0)


def _new_word(product: torch.Tensor, word: torch.Tensor, key: int) -> torch.Tensor:
    """The high word of a product, mixed with the low bits of two numbers."""
    high = (product >> 32).bitwise_xor(word)
    return high.bitwise_xor_(key).bitwise_and_(_MASK)


def uniform(
    seed: int, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> torch.Tensor:
    """Uniform numbers in (0, 1), one fp32 draw per counter.

    ``((word >> 9) + 0.5) * 2**-23`` is exact in fp32 and never 0 or 1.
    """
    return ((philox_word(seed, c0, c1, c2, c3) >> 9).float() + 0.5) * 2.0**-23


def gumbel(
    seed: int, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> torch.Tensor:
    """Standard Gumbel noise, ``-log(-log(u))``, one fp32 draw per counter; always finite."""
    return uniform(seed, c0, c1, c2, c3).log_().neg_().log_().neg_()
