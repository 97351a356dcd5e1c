"""Scores of the candidates: the two kernels that stream K and V, on tensor cores.

Cost of one head with n = 4096 candidates, W = 64, G = 4, D = 128 in bf16. K and V are 1 MiB each; K
is read twice and V once: 3 MiB. Each of the two passes over K multiplies 2 * 256 * 128 * 4096 =
268 MFLOP and takes 256 * 4096 = 1.05 M exponentials. On an H200 (4.8 TB/s; 989 TFLOP/s; 132 SMs, 16
exp2 per cycle each at 1.8 GHz) the head takes 0.66 us of memory, 0.54 us of tensor cores and
0.55 us of exponentials. Two programs of 8 warps share an SM, each with at most 128 registers per
thread and 113 KiB of shared memory: 256 query rows, the K tile that is multiplied and two in
flight, whose blocks are read a round before their keys. That was to let the three overlap, and an
H200 hardly does: it takes 0.73 us a head for the first pass and 0.97 for the second, of which the
values are 0.34 (2026-11-26, Triton 3.6). One program an SM, other tiles, and a product issued
ahead of the exponentials were slower: benchmarks/kernels/README.md.

What would avoid the second product costs more: the logits are 4 MiB in fp32, and to write and read
them takes 1.7 us; to keep them on chip between the passes takes 4 MiB of registers per head, so
that 8 heads fill the GPU and every 5 us of work ends in a barrier across programs. One pass alone
cannot weigh the queries, for their denominators differ, unless a number per query and key is kept.
"""

import triton
import triton.language as tl

from vase_vllm.kernels.paged import (
    Batch,
    cell_pointers,
    load_task,
    load_vectors,
    ring_pointers,
    slot_blocks,
    slot_pointers,
    task_pages,
)
from vase_vllm.kernels.search import HIGHEST, ordered_bits

MAX_SPLITS = 16
"""The most programs that share the candidates of one head."""

_MAX_SPLITS = tl.constexpr(MAX_SPLITS)
LOWEST = tl.constexpr(-1e30)
"""Below every product of a query and a key."""
_VARYING = ["task_offset", "num_splits", "capacity", "scale"]


@triton.jit
def load_queries(
    pages,
    index,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """Query rows of the ring, one per index: row = entry * G + head, zeros beyond."""
    live = index < GROUP * WINDOW
    pointers = ring_pointers(pages, index // GROUP, index % GROUP, live, GROUP, HEAD_SIZE)
    return load_vectors(pointers, live, 0, HEAD_SIZE)


@triton.jit
def multiply(a, b, EXACT: tl.constexpr):
    """``a @ b`` accumulated in fp32: on tensor cores, or with fp32 operands if EXACT."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def newest_slots(task, index, WINDOW: tl.constexpr, GROUP: tl.constexpr):
    """Slots of the newest token that each query row has seen, which is its own.

    The query of position p is ring entry p mod W, the window's tokens lie in order of position
    behind the candidates, and the position that comes next is whole windows after ``first``.
    """
    order = (index // GROUP + WINDOW - tl.load(task.table_row) % WINDOW) % WINDOW
    return task.candidates + order


@triton.jit
def split_range(split, num_splits, candidates, TILE: tl.constexpr):
    """First and last + 1 candidate of a split: whole tiles, evenly; may be empty at the end."""
    length = tl.cdiv(tl.cdiv(candidates, TILE), num_splits) * TILE
    return split * length, tl.minimum((split + 1) * length, candidates)


@triton.jit(do_not_specialize=_VARYING)
def row_statistics(
    kv_pointers,  # [layers] int64, addresses of [blocks, heads, block_size, 2 * D] caches
    block_table,  # [R, columns] int32
    rows,  # [due] int32
    counts,  # [due, 3] int32: budget, sinks, protected
    positions,  # [R] int32 or int64
    maxima,  # [tasks, splits, G * W] fp32, out, in units of log2
    sums,  # [tasks, splits, G * W] fp32, out
    task_offset,
    num_splits,
    capacity,
    scale,  # log2(e) / (sqrt(D) * temperature)
    num_layers,
    num_kv_heads,
    table_stride,
    block_stride,
    head_stride,
    slot_stride,
    KV_TYPE: tl.constexpr,
    EXACT: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    WINDOW_SCORES: tl.constexpr,  # above 0: over the window's keys up to the query's own as well
):
    """``m = max_j x_j`` and ``l = sum_j 2^(x_j - m)`` per query row, over one split.

    The splits are those of the candidates, with WINDOW_SCORES of the window behind them, too.
    """
    NUM_CHUNKS: tl.constexpr = (GROUP * WINDOW + QUERY_TILE - 1) // QUERY_TILE
    program = tl.program_id(0)
    split = program % num_splits
    chunk = program // num_splits % NUM_CHUNKS
    local_task = program // (num_splits * NUM_CHUNKS)
    batch = Batch(rows, counts, positions, block_table, table_stride, num_layers, num_kv_heads)
    task = load_task(batch, local_task + task_offset, capacity, WINDOW)
    if task.candidates > 0:
        pages = task_pages(
            task, kv_pointers, block_stride, head_stride, slot_stride, KV_TYPE, BLOCK_SIZE
        )
        index = chunk * QUERY_TILE + tl.arange(0, QUERY_TILE)
        queries = load_queries(pages, index, WINDOW, GROUP, HEAD_SIZE)
        # Finite, so that no infinity is subtracted from another.
        maximum = tl.full([QUERY_TILE], LOWEST, tl.float32)
        total = tl.zeros([QUERY_TILE], tl.float32)
        length = task.candidates
        if WINDOW_SCORES > 0:
            length += WINDOW
            newest = newest_slots(task, index, WINDOW, GROUP)
        begin, end = split_range(split, num_splits, length, KEY_TILE)
        lanes = tl.arange(0, KEY_TILE)
        blocks = slot_blocks(pages, begin + lanes, begin + lanes < end)
        for start in range(begin, end, KEY_TILE):
            slots = start + lanes
            live = slots < end
            cells = cell_pointers(pages, blocks, slots)
            # The next tile's, so that its keys can be asked for while this tile is multiplied.
            ahead = slots + KEY_TILE
            blocks = slot_blocks(pages, ahead, ahead < end)
            keys = load_vectors(cells, live, 0, HEAD_SIZE)
            products = multiply(queries, tl.trans(keys), EXACT)
            if WINDOW_SCORES > 0:
                seen = slots[None, :] <= newest[:, None]
            else:
                seen = live[None, :]
            products = tl.where(seen, products, float("-inf"))
            # Scaled only where it is subtracted, which is one multiply-add for each product.
            new_maximum = tl.maximum(maximum, tl.max(products, axis=1))
            shift = new_maximum * scale
            total = total * tl.exp2(maximum * scale - shift)
            total += tl.sum(tl.exp2(products * scale - shift[:, None]), axis=1)
            maximum = new_maximum
        out = (local_task.to(tl.int64) * num_splits + split) * (GROUP * WINDOW) + index
        tl.store(maxima + out, maximum * scale, mask=index < GROUP * WINDOW)
        tl.store(sums + out, total, mask=index < GROUP * WINDOW)


@triton.jit
def merged_log_sum(maxima, sums, row_offset, index, num_splits, ROWS: tl.constexpr):
    """log2 of the softmax denominator per query row, +inf for padding rows (weight 0)."""
    splits = tl.arange(0, _MAX_SPLITS)
    offsets = row_offset + splits[:, None] * ROWS + index[None, :]
    live = (splits < num_splits)[:, None] & (index < ROWS)[None, :]
    split_maximum = tl.load(maxima + offsets, mask=live, other=float("-inf"))
    split_sum = tl.load(sums + offsets, mask=live, other=0.0)
    maximum = tl.max(split_maximum, axis=0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(split_sum * tl.exp2(split_maximum - shift[None, :]), axis=0)
    return tl.where(index < ROWS, shift + tl.log2(total), float("inf"))


@triton.jit
def row_range(x, live):
    """``max - min`` of each row of ``x`` over its live columns."""
    highest = tl.max(tl.where(live[None, :], x, float("-inf")), axis=1)
    return highest - tl.min(tl.where(live[None, :], x, float("inf")), axis=1)


@triton.jit(do_not_specialize=[*_VARYING, "chunk"])
def candidate_scores(
    kv_pointers,  # [layers] int64, addresses of [blocks, heads, block_size, 2 * D] caches
    block_table,  # [R, columns] int32
    rows,  # [due] int32
    counts,  # [due, 3] int32: budget, sinks, protected
    positions,  # [R] int32 or int64
    maxima,  # [tasks, splits, G * W] fp32
    sums,  # [tasks, splits, G * W] fp32
    scores,  # [tasks, capacity + WINDOW_SCORES] fp32, out: sum over the query rows, before pooling
    ordered,  # [tasks, capacity] int32, out if values are read: ordered bits of their range
    task_offset,
    num_splits,
    capacity,
    chunk,  # which QUERY_TILE of the query rows; launched in order, each adds to the scores
    scale,  # log2(e) / (sqrt(D) * temperature)
    num_layers,
    num_kv_heads,
    table_stride,
    block_stride,
    head_stride,
    slot_stride,
    KV_TYPE: tl.constexpr,
    EXACT: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    WINDOW_SCORES: tl.constexpr,  # words of the window's own scores behind the others; 0: none
    VALUE_TILE: tl.constexpr,  # candidates of each K tile whose values a chunk reads; 0: none
    PREFETCH_VALUES: tl.constexpr,  # else another program of the SM covers the wait for them
):
    """``sum_gw 2^(x_gwj - m_gw) / l_gw`` and ``max_d v - min_d v`` per candidate of one split.

    Without a VALUE_TILE V is left to ``token_distinctness``.
    """
    ROWS: tl.constexpr = GROUP * WINDOW
    NUM_CHUNKS: tl.constexpr = (ROWS + QUERY_TILE - 1) // QUERY_TILE
    program = tl.program_id(0)
    split = program % num_splits
    local_task = program // num_splits
    batch = Batch(rows, counts, positions, block_table, table_stride, num_layers, num_kv_heads)
    task = load_task(batch, local_task + task_offset, capacity, WINDOW)
    if task.candidates > 0:
        pages = task_pages(
            task, kv_pointers, block_stride, head_stride, slot_stride, KV_TYPE, BLOCK_SIZE
        )
        dims = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
        scores += local_task.to(tl.int64) * (capacity + WINDOW_SCORES)
        ordered += local_task.to(tl.int64) * capacity
        begin, end = split_range(split, num_splits, task.candidates, KEY_TILE)
        index = chunk * QUERY_TILE + tl.arange(0, QUERY_TILE)
        # Keys are the rows of the product: then a candidate's weights lie in few threads, and few
        # shuffles add them up. The queries are transposed here, for in the loop they would be
        # written to shared memory in every round.
        queries = tl.trans(load_queries(pages, index, WINDOW, GROUP, HEAD_SIZE))
        row_offset = local_task.to(tl.int64) * num_splits * ROWS
        log_sum = merged_log_sum(maxima, sums, row_offset, index, num_splits, ROWS)
        # The first chunk has nothing to add to.
        summed_end = tl.where(chunk > 0, end, 0)
        lanes = tl.arange(0, KEY_TILE)
        if VALUE_TILE > 0:
            value_lanes = chunk * VALUE_TILE + tl.arange(0, VALUE_TILE)
            value_end = tl.where(chunk * VALUE_TILE < KEY_TILE, end, 0)
        blocks = slot_blocks(pages, begin + lanes, begin + lanes < end)
        for start in range(begin, end, KEY_TILE):
            slots = start + lanes
            live = slots < end
            cells = cell_pointers(pages, blocks, slots)
            # The next tile's, so that its keys can be asked for while this tile is multiplied.
            ahead = slots + KEY_TILE
            blocks = slot_blocks(pages, ahead, ahead < end)
            if VALUE_TILE > 0:
                # Addresses of their own: those of the keys are two rounds ahead, and to keep them
                # until now takes more registers than there are.
                value_slots = start + value_lanes
                has_value = value_slots < value_end
                value_cells = slot_pointers(pages, value_slots, has_value)
                if PREFETCH_VALUES:
                    values = load_vectors(value_cells, has_value, HEAD_SIZE, HEAD_SIZE)
            keys = load_vectors(cells, live, 0, HEAD_SIZE)
            logits = multiply(keys, queries, EXACT) * scale
            score = tl.sum(tl.exp2(logits - log_sum[None, :]), axis=1)
            if NUM_CHUNKS > 1:
                score += tl.load(scores + slots, mask=slots < summed_end, other=0.0)
            tl.store(scores + slots, score, mask=live)
            if VALUE_TILE > 0:
                if not PREFETCH_VALUES:
                    values = load_vectors(value_cells, has_value, HEAD_SIZE, HEAD_SIZE)
                bits = ordered_bits(row_range(values.to(tl.float32), dims < HEAD_SIZE))
                bits = tl.where(value_slots < task.sinks, HIGHEST, bits)
                tl.store(ordered + value_slots, bits.to(tl.int32, bitcast=True), mask=has_value)
