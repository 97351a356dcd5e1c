"""Selection and moves: one program for each head.

With attention, ``select_and_move`` reads the ordered bits of a head five times (two searches
(``search.py``), the ties, the priorities, the survivors) and its scores once per slot of the
pooling, 5 times by default. In the steady state it moves W cells. What strata add: ``strata.py``.
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
from vase_vllm.kernels.search import (
    HIGHEST,
    is_selected,
    k_largest,
    load_ordered,
    ordered_bits,
    ordered_positions,
)
from vase_vllm.kernels.strata import keep_by_strata, load_positions, newest_positions


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
    places,  # [tasks, capacity] int32, to work in with STRATA above 1; else None
    members,  # the same
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
    numbers_stride,  # between the numbers that go along with a token; None: attention is none
    KV_TYPE: tl.constexpr,
    SCORING: tl.constexpr,
    GUMBEL: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WINDOW_SCORES: tl.constexpr,  # words of the window's own scores behind the others; 0: none
    STRATA: tl.constexpr,  # parts by position that keep equally many; 1: there are none
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
        if STRATA > 1:
            places += tl.multiple_of(local_task.to(tl.int64) * capacity, 16)
            members += tl.multiple_of(local_task.to(tl.int64) * capacity, 16)
            first_number = 0
            if numbers_stride is not None:
                first_number = 2 * numbers_stride
            # Again below, so that without strata no address is held through the searches.
            pages = task_pages(
                task, kv_pointers, block_stride, head_stride, slot_stride, KV_TYPE, BLOCK_SIZE
            )
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
            if STRATA > 1:
                # Those that are protected have no place.
                position = load_positions(
                    task, pages, slots, first_number, WINDOW, GROUP, HEAD_SIZE, BLOCK_SIZE
                )
                tl.store(places + slots, tl.where(kept, 0, position + 1), mask=live)
        if nan_keys is not None:
            tl.store(nan_keys + task.due, key, mask=tl.max(is_nan, axis=0) > 0)
        tl.debug_barrier()

        # Survivors; the slots below the budget that do not survive, in ascending order.
        num_kept = task.budget - WINDOW
        if STRATA > 1:
            keep_by_strata(
                ordered,
                places,
                members,
                candidates,
                task.protected,
                num_kept,
                STRATA,
                SEARCH_TILE,
                TILE,
            )
        threshold, tie_end = k_largest(ordered, candidates, num_kept, SEARCH_TILE, TILE)
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
            if STRATA > 1:
                number = first_number + target_slots - tl.load(task.table_row + KEPT_COLUMN)
                pointers = number_pointers(
                    pages, number, kept, WINDOW, GROUP, HEAD_SIZE, BLOCK_SIZE
                )
                position = newest_positions(task, slots, WINDOW)
                tl.store(pointers, position.to(tl.float32), mask=kept)
