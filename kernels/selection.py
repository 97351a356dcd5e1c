"""Selection and moves: an exact top-k without a sort, on rows of scratch memory.

A float is ranked by its ordered bits, an unsigned integer that grows with it. The k-th largest is
found digit by digit, two bits at a time: a sweep over the row counts what reaches each of four
thresholds, sixteen sweeps settle 32 bits, and one more counts what lies above the result. Ties at
the threshold go to the lower slot, by a prefix count.

With attention, ``select_and_move`` reads the ordered bits of a head 36 times (two searches of 17
sweeps, the priorities, the survivors) and its scores once per slot of the pooling, 5 times by
default: 41 rows of 16 KiB for 4096 candidates, from L1 or L2. In the steady state it moves W cells.
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

DIGIT_BITS = tl.constexpr(2)
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
def load_ordered(ordered, slots, live):
    """Ordered bits of slots as uint32, 0 (below every float) where not live."""
    return tl.load(ordered + slots, mask=live, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def kth_largest(ordered, length, k, TILE: tl.constexpr):
    """The k-th largest of ``ordered[:length]``, and how many equal to it are among the k largest.

    Args:
        ordered: pointer to int32, the bits of ordered uint32.
        k: at most length; 0 selects nothing.

    Returns:
        (threshold uint32, ties int32): x is selected if ``x > threshold``, or if
        ``x == threshold`` and fewer than ``ties`` equal ones lie in lower slots.
    """
    DIGITS: tl.constexpr = 2**DIGIT_BITS
    digits = tl.arange(0, DIGITS)
    threshold = tl.full([1], 0, tl.uint32)
    for step in range(32 // DIGIT_BITS):
        shift = 32 - DIGIT_BITS * (step + 1)
        levels = threshold + (digits << shift).to(tl.uint32)
        counts = tl.zeros([DIGITS, TILE], tl.int32)
        for start in range(0, length, TILE):
            slots = start + tl.arange(0, TILE)
            x = load_ordered(ordered, slots, slots < length)
            counts += (x[None, :] >= levels[:, None]).to(tl.int32)
        reached = tl.sum((tl.sum(counts, axis=1) >= k).to(tl.int32), axis=0)
        threshold += ((reached - 1) << shift).to(tl.uint32)
    above = tl.zeros([TILE], tl.int32)
    for start in range(0, length, TILE):
        slots = start + tl.arange(0, TILE)
        above += (load_ordered(ordered, slots, slots < length) > threshold).to(tl.int32)
    return threshold, k - tl.sum(above, axis=0)


@triton.jit
def select_tile(x, live, threshold, ties, ties_seen):
    """Which of one tile are selected; tiles must come in ascending order.

    Returns:
        (selected, ties seen so far including this tile).
    """
    tied = live & (x == threshold)
    tied_count = tied.to(tl.int32)
    rank = ties_seen + tl.cumsum(tied_count, axis=0) - tied_count
    selected = live & ((x > threshold) | (tied & (rank < ties)))
    return selected, ties_seen + tl.sum(tied_count, axis=0)


@triton.jit
def gumbel_noise(seed_low, seed_high, slots, eviction, stream, key):
    """Standard Gumbel noise per slot: ``kernels/philox.py`` bit for bit up to the logarithms."""
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    word, _, _, _ = tl.philox((high << 32) | low, slots, eviction, stream, key)
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def pooled_scores(scores, slots, live, length, SMOOTHING: tl.constexpr):
    """Sum of the scores around each slot, zero outside ``[0, length)``."""
    pooled = tl.zeros(slots.shape, tl.float32)
    for offset in tl.static_range(SMOOTHING):
        neighbours = slots + offset - SMOOTHING // 2
        inside = live & (neighbours >= 0) & (neighbours < length)
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
        ordered += local_task.to(tl.int64) * capacity

        # Protected: the largest value ranges, or the sinks alone. All others get their priority.
        if SCORING == "attention":
            threshold, ties = kth_largest(ordered, candidates, task.protected, TILE)
        if SCORING == "age":
            slot_priority += task.due.to(tl.int64) * num_priorities
        key = tl.load(task.table_row + 1)
        stream = tl.load(layer_indices + task.layer) * 65536 + first_kv_head + task.head
        ties_seen = 0
        is_nan = tl.zeros([TILE], tl.int32)
        for start in range(0, candidates, TILE):
            slots = start + tl.arange(0, TILE)
            live = slots < candidates
            if SCORING == "attention":
                x = load_ordered(ordered, slots, live)
                kept, ties_seen = select_tile(x, live, threshold, ties, ties_seen)
                priority = pooled_scores(scores, slots, live, candidates, SMOOTHING)
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
        threshold, ties = kth_largest(ordered, candidates, task.budget - WINDOW, TILE)
        freed = scores.to(tl.pointer_type(tl.int32))
        num_freed = 0
        ties_seen = 0
        for start in range(0, task.budget, TILE):
            slots = start + tl.arange(0, TILE)
            live = slots < task.budget
            x = load_ordered(ordered, slots, live)
            kept, ties_seen = select_tile(x, live, threshold, ties, ties_seen)
            gone = (live & ~kept).to(tl.int32)
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
            live = slots < candidates
            x = load_ordered(ordered, slots, live)
            kept, ties_seen = select_tile(x, live, threshold, ties, ties_seen)
            kept = kept | ((slots >= candidates) & (slots < candidates + WINDOW))
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
                first = number_pointers(pages, number, kept, WINDOW, GROUP, HEAD_SIZE)
                number += numbers_stride
                second = number_pointers(pages, number, kept, WINDOW, GROUP, HEAD_SIZE)
                tl.store(first, received, mask=kept)
                tl.store(second, asked, mask=kept)
