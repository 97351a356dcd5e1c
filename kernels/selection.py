"""Selection and moves: an exact top-k without a sort, on rows of scratch memory.

A float is ranked by its ordered bits, an unsigned integer that grows with it. The k-th largest is
found bit by bit, from the highest: a program counts how many numbers reach the threshold with the
bit set. Bits that are the same in all numbers are known beforehand, and as soon as exactly k
numbers reach the threshold the rest of its bits do not matter. Of 4096 candidates that is 10 to 17
counts for the value ranges, which are differences of 16-bit numbers and often equal, and 18 or 19
for priorities with noise; never more than 32. Ties at the threshold go to the lower slots.

The search holds its numbers in registers, 32 a thread for SEARCH_TILE of 4096, so that a count is a
comparison and an addition for each, and a sum over the program; heads with more candidates read
them anew for every bit. With attention, ``select_and_move`` reads the ordered bits of a head five
times (two searches, the ties, the priorities, the survivors) and its scores once per slot of the
pooling, 5 times by default. In the steady state it moves W cells.
"""

import triton
import triton.language as tl

from vase_vllm.kernels.paged import (
    KEPT_COLUMN,
    Batch,
    load_task,
    number_pointers,
    slot_pointers,
    task_pages,
)

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


@triton.jit
def gumbel_noise(seed_low, seed_high, slots, eviction, stream, key):
    """Standard Gumbel noise per slot: ``kernels/philox.py`` bit for bit up to the logarithms."""
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    word, _, _, _ = tl.philox((high << 32) | low, slots, eviction, stream, key)
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def pooled_scores(scores, slots, length, SMOOTHING: tl.constexpr):
    """Sum of the scores around each slot, those outside ``[0, length)`` being 0."""
    pooled = tl.zeros(slots.shape, tl.float32)
    for offset in tl.static_range(SMOOTHING):
        neighbours = slots + offset - SMOOTHING // 2
        # Those below 0 are large unsigned numbers.
        inside = neighbours.to(tl.uint32) < length.to(tl.uint32)
        pooled += tl.load(scores + neighbours, mask=inside, other=0.0)
    return pooled


@triton.jit(
    do_not_specialize=[
        "task_offset",
        "capacity",
        "seed_low",
        "seed_high",
        "first_kv_head",
        "num_priorities",
    ]
)
def select_and_move(
    kv_pointers,  # [layers] int64, addresses of [blocks, heads, block_size, 2 * D] caches
    layer_indices,  # [layers] int32, in the whole model
    block_table,  # [R, columns] int32
    rows,  # [due] int32
    counts,  # [due, 3] int32: budget, sinks, protected
    positions,  # [R] int32 or int64
    scores,  # [tasks, capacity + WINDOW_SCORES] fp32, in for "attention"; then the freed slots
    ordered,  # [tasks, capacity] int32; ranges in, overwritten with the priorities
    slot_priority,  # [due, num_priorities] int32, what ranks each slot; None unless "age"
    nan_keys,  # [due] int32, out: a row's key where a priority is NaN; or None
    task_offset,
    capacity,
    seed_low,  # int32 bits
    seed_high,  # int32 bits
    first_kv_head,  # of this rank in the whole model
    num_layers,
    num_kv_heads,
    table_stride,
    block_stride,
    head_stride,
    slot_stride,
    num_priorities,
    numbers_stride,  # between the two numbers that go along with a token; None: none go along
    KV_TYPE: tl.constexpr,
    SCORING: tl.constexpr,
    GUMBEL: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WINDOW_SCORES: tl.constexpr,  # words of the window's own scores behind the others; 0: none
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SEARCH_TILE: tl.constexpr,  # candidates of a head that a search keeps in registers
    TILE: tl.constexpr,
    MOVE_TILE: tl.constexpr,
):
    """Choose the survivors of one head and copy those above the budget into freed slots.

    Priority by SCORING: the logarithm of the attention ("attention") or of 1 ("uniform"), with
    Gumbel noise if GUMBEL, else the score itself; the number given for the slot ("age").
    """
    local_task = tl.program_id(0)
    limit = capacity
    if SCORING == "age":
        limit = tl.minimum(capacity, num_priorities)
    batch = Batch(rows, counts, positions, block_table, table_stride, num_layers, num_kv_heads)
    task = load_task(batch, local_task + task_offset, limit, WINDOW)
    candidates = task.candidates
    if candidates > 0:
        scores += local_task.to(tl.int64) * (capacity + WINDOW_SCORES)
        ordered += tl.multiple_of(local_task.to(tl.int64) * capacity, 16)

        # Protected: the largest value ranges, or the sinks alone. All others get their priority.
        if SCORING == "attention":
            threshold, tie_end = k_largest(ordered, candidates, task.protected, SEARCH_TILE, TILE)
        if SCORING == "age":
            slot_priority += task.due.to(tl.int64) * num_priorities
        key = tl.load(task.table_row + 1)
        stream = tl.load(layer_indices + task.layer) * 65536 + first_kv_head + task.head
        is_nan = tl.zeros([TILE], tl.int32)
        for start in range(0, candidates, TILE):
            slots = start + tl.arange(0, TILE)
            live = slots < candidates
            if SCORING == "attention":
                x = load_ordered(ordered, slots, candidates)
                kept = is_selected(x, slots, threshold, tie_end)
                priority = pooled_scores(scores, slots, candidates, SMOOTHING)
                priority = priority / (SMOOTHING * GROUP * WINDOW)
            else:
                kept = slots < task.protected
                priority = tl.full(slots.shape, 1.0, tl.float32)
            if GUMBEL:
                noise = gumbel_noise(seed_low, seed_high, slots, task.eviction, stream, key)
                priority = tl.log(priority) + noise
            if SCORING == "age":
                bits = ordered_positions(tl.load(slot_priority + slots, mask=live, other=0))
            else:
                bits = ordered_bits(priority)
                is_nan |= (live & ~kept & (priority != priority)).to(tl.int32)
            bits = tl.where(kept, HIGHEST, bits)
            tl.store(ordered + slots, bits.to(tl.int32, bitcast=True), mask=live)
        if nan_keys is not None:
            tl.store(nan_keys + task.due, key, mask=tl.max(is_nan, axis=0) > 0)
        tl.debug_barrier()

        # Survivors; the slots below the budget that do not survive, in ascending order.
        threshold, tie_end = k_largest(ordered, candidates, task.budget - WINDOW, SEARCH_TILE, TILE)
        freed = scores.to(tl.pointer_type(tl.int32))
        num_freed = 0
        # In larger tiles, for a round waits at ten barriers.
        FREED_TILE: tl.constexpr = min(SEARCH_TILE, 2 * TILE)
        for start in range(0, task.budget, FREED_TILE):
            slots = start + tl.arange(0, FREED_TILE)
            live = slots < task.budget
            x = load_ordered(ordered, slots, task.budget)
            gone = (live & ~is_selected(x, slots, threshold, tie_end)).to(tl.int32)
            rank = num_freed + tl.cumsum(gone, axis=0) - gone
            tl.store(freed + rank, slots, mask=gone > 0)
            num_freed += tl.sum(gone, axis=0)
        tl.debug_barrier()

        # The i-th survivor above the budget, the window last, fills the i-th freed slot. Sources
        # and destinations are disjoint.
        pages = task_pages(
            task, kv_pointers, block_stride, head_stride, slot_stride, KV_TYPE, BLOCK_SIZE
        )
        dims = tl.arange(0, triton.next_power_of_2(2 * HEAD_SIZE))
        num_moved = 0
        for start in range(task.budget, candidates + WINDOW, MOVE_TILE):
            slots = start + tl.arange(0, MOVE_TILE)
            # Slots behind the candidates rank highest.
            x = load_ordered(ordered, slots, candidates)
            kept = is_selected(x, slots, threshold, tie_end) & (slots < candidates + WINDOW)
            count = kept.to(tl.int32)
            rank = num_moved + tl.cumsum(count, axis=0) - count
            num_moved += tl.sum(count, axis=0)
            target_slots = tl.load(freed + rank, mask=kept, other=0)
            source = slot_pointers(pages, slots, kept)
            target = slot_pointers(pages, target_slots, kept)
            mask = kept[:, None] & (dims < 2 * HEAD_SIZE)[None, :]
            cells = tl.load(source[:, None] + dims[None, :], mask=mask)
            tl.store(target[:, None] + dims[None, :], cells, mask=mask)
            if numbers_stride is not None:
                # What lies above the budget has been seen by this window alone: a candidate there
                # is at its first eviction. Scores above the budget have not become freed slots.
                received = tl.load(scores + slots, mask=kept, other=0.0)
                asked = tl.minimum(candidates + WINDOW - slots, WINDOW).to(tl.float32)
                number = target_slots - tl.load(task.table_row + KEPT_COLUMN)
                first = number_pointers(pages, number, kept, WINDOW, GROUP, HEAD_SIZE, BLOCK_SIZE)
                number += numbers_stride
                second = number_pointers(pages, number, kept, WINDOW, GROUP, HEAD_SIZE, BLOCK_SIZE)
                tl.store(first, received, mask=kept)
                tl.store(second, asked, mask=kept)
