"""The k largest of a row of scratch memory: exact, and without a sort.

A float is ranked by its ordered bits, an unsigned integer that grows with it. The k-th largest is
found bit by bit, from the highest: a program counts how many numbers reach the threshold with the
bit set. Bits that are the same in all numbers are known beforehand, and as soon as exactly k
numbers reach the threshold the rest of its bits do not matter. Of 4096 candidates that is 10 to 17
counts for the value ranges, which are differences of 16-bit numbers and often equal, and 18 or 19
for priorities with noise; never more than 32. Ties at the threshold go to the lower slots.

The search holds its numbers in registers, 32 a thread for SEARCH_TILE of 4096, so that a count is a
comparison and an addition for each, and a sum over the program; heads with more candidates read
them anew for every bit.
"""

import triton
import triton.language as tl

HIGHEST = tl.constexpr(0xFFFFFFFF)
"""Above the ordered bits of every float: always selected first."""


@triton.jit
def ordered_bits(x):
    """fp32 -> uint32 with the same order; -0 equals +0, and NaN equals -inf."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    bits = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x == x, bits, tl.full(bits.shape, 0x007FFFFF, tl.uint32))


@triton.jit
def ordered_positions(positions):
    """int32 -> uint32 with the same order."""
    return positions.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def load_ordered(ordered, slots, length):
    """Ordered bits of slots as uint32, ``HIGHEST`` from ``length`` on."""
    # Four at a time, which a row has room for.
    x = tl.load(ordered + slots, mask=slots < tl.cdiv(length, 4) * 4, other=-1)
    return tl.where(slots < length, x, -1).to(tl.uint32, bitcast=True)


@triton.jit
def kth_largest(ordered, length, k, TILE: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """The k-th largest of ``ordered[:length]``, bit by bit, or a lower bound that k of them reach.

    Args:
        ordered: pointer to int32, the bits of ordered uint32; its row ends at a multiple of four.
        k: at most length, and at least as many as are ``HIGHEST``.
        IN_REGISTERS: ``length`` is at most TILE.

    Returns:
        (threshold uint32, excess int32): k + excess numbers are at least the threshold, and with
        any excess it is the k-th largest.
    """
    lanes = tl.arange(0, TILE)
    # All reach a threshold of no bits. Slots beyond the last are ``HIGHEST``, and are counted.
    reached = tl.cdiv(length, TILE) * TILE
    k += reached - length
    if IN_REGISTERS:
        x = load_ordered(ordered, lanes, length)
        ones, zeros = tl.where(x != HIGHEST, x, 0), ~x
    else:
        ones, zeros = tl.zeros([TILE], tl.uint32), tl.zeros([TILE], tl.uint32)
        for start in range(0, length, TILE):
            x = load_ordered(ordered, start + lanes, length)
            ones |= tl.where(x != HIGHEST, x, 0)
            zeros |= ~x
    any_one, any_zero = tl.reduce_or(ones, axis=0), tl.reduce_or(zeros, axis=0)
    # Of those below ``HIGHEST``: the bits that are 1 in all, and those that differ.
    threshold, differing = any_one & (~any_zero), any_one & any_zero
    for step in range(32):
        bit = tl.full([], 0x80000000, tl.uint32) >> step
        if (differing & bit != 0) & (reached != k):
            level = threshold | bit
            if IN_REGISTERS:
                counts = (x >= level).to(tl.int32)
            else:
                counts = tl.zeros([TILE], tl.int32)
                for start in range(0, length, TILE):
                    counts += (load_ordered(ordered, start + lanes, length) >= level).to(tl.int32)
            count = tl.sum(counts, axis=0)
            if count >= k:
                threshold = level
                reached = count
    return threshold, reached - k


@triton.jit
def k_largest(ordered, length, k, SEARCH_TILE: tl.constexpr, TILE: tl.constexpr):
    """What selects the k largest of ``ordered[:length]``, of equal ones those in the lower slots.

    Args:
        ordered, k: see :func:`kth_largest`; a k of 0 selects nothing.
        SEARCH_TILE: so many are searched in registers; more are read anew for every bit.

    Returns:
        (threshold uint32, tie_end int32) for :func:`is_selected`.
    """
    if length <= SEARCH_TILE:
        threshold, excess = kth_largest(ordered, length, k, SEARCH_TILE, True)
    else:
        threshold, excess = kth_largest(ordered, length, k, TILE, False)
    # The excess is dropped from the highest slots of those that equal the threshold.
    tie_end = length
    start = tl.cdiv(length, TILE) * TILE
    num_ties = 0
    while (excess > 0) & (num_ties <= excess) & (start > 0):
        start -= TILE
        x = load_ordered(ordered, start + tl.arange(0, TILE), length)
        tied = (x == threshold).to(tl.int32)
        rank = num_ties + tl.cumsum(tied, axis=0, reverse=True)
        tie_end = start + tl.sum((rank > excess).to(tl.int32), axis=0)
        num_ties += tl.sum(tied, axis=0)
    return threshold, tie_end


@triton.jit
def is_selected(x, slots, threshold, tie_end):
    """Which of the slots, whose ordered bits are x, are selected; all beyond the last are."""
    return (x > threshold) | ((x == threshold) & (slots < tie_end))
