"""The attention received from earlier windows: two kernels that ``memory`` adds to the scoring.

Per head, with m the ``memory``, and a[g, w, j] the softmax over all tokens that the sequence held
when query w was computed: the candidates, and the window's up to the query's own:

    received[j] = sum over g, w of a[g, w, j] + m * received[j] of the last eviction
    asked[j] = how many w have seen j + m * asked[j] of the last eviction

Their quotient, a mean over queries in which those of the last window count most, takes the place of
the attention. Both numbers go along with a token in the state blocks (``layout/token_state.py``).
``policies/received.py`` is the same in plain torch.

1. ``row_statistics`` goes over the window's keys as well, each query up to its own;
   ``candidate_scores`` as ever.
2. ``window_scores``: the last window's part of the received attention of its own tokens.
3. ``remember_attention``: both numbers of the candidates below the budget, and the quotient of all.
   A candidate above the budget is at its first eviction, for later there are none.
4. ``select_and_move`` writes the numbers of the tokens that it moves: these, and the window's.

Cost of one head with n = 4096, W = 64, G = 4, D = 128 in bf16: 16 bytes of state and 8 of scratch
memory for each candidate, 96 KiB beside 3 MiB of K and V; for the window one tile more than 64 in
the first pass, and once more 2 * 256 * 128 * 64 = 4 MFLOP.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from vase_vllm.kernels.launch import Launch
from vase_vllm.kernels.paged import (
    KEPT_COLUMN,
    Batch,
    load_task,
    load_vectors,
    number_pointers,
    slot_pointers,
    task_pages,
)
from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.kernels.scoring import (
    load_queries,
    merged_log_sum,
    multiply,
    newest_slots,
    split_range,
)
from vase_vllm.kernels.scratch import some
from vase_vllm.layout.arithmetic import cdiv

TILE = 512
"""Candidates per step."""


@triton.jit(do_not_specialize=["task_offset", "num_splits", "capacity", "scale"])
def window_scores(
    kv_pointers,  # [layers] int64, addresses of [blocks, heads, block_size, 2 * D] caches
    block_table,  # [R, columns] int32
    rows,  # [due] int32
    counts,  # [due, 3] int32: budget, sinks, protected
    positions,  # [R] int32 or int64
    maxima,  # [tasks, splits, G * W] fp32
    sums,  # [tasks, splits, G * W] fp32
    scores,  # [tasks, capacity + WINDOW_SCORES] fp32, out: behind those of the candidates
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
    WINDOW_SCORES: tl.constexpr,
):
    """The scores of a tile of the window's own tokens, each by the queries that have seen it."""
    ROWS: tl.constexpr = GROUP * WINDOW
    NUM_TILES: tl.constexpr = (WINDOW + KEY_TILE - 1) // KEY_TILE
    program = tl.program_id(0)
    local_task = program // NUM_TILES
    batch = Batch(rows, counts, positions, block_table, table_stride, num_layers, num_kv_heads)
    task = load_task(batch, local_task + task_offset, capacity, WINDOW)
    if task.candidates > 0:
        pages = task_pages(
            task, kv_pointers, block_stride, head_stride, slot_stride, KV_TYPE, BLOCK_SIZE
        )
        slots = task.candidates + program % NUM_TILES * KEY_TILE + tl.arange(0, KEY_TILE)
        live = slots < task.candidates + WINDOW
        keys = tl.trans(load_vectors(slot_pointers(pages, slots, live), live, 0, HEAD_SIZE))
        row_offset = local_task.to(tl.int64) * num_splits * ROWS
        total = tl.zeros([KEY_TILE], tl.float32)
        for start in range(0, ROWS, QUERY_TILE):
            index = start + tl.arange(0, QUERY_TILE)
            log_sum = merged_log_sum(maxima, sums, row_offset, index, num_splits, ROWS)
            queries = load_queries(pages, index, WINDOW, GROUP, HEAD_SIZE)
            logits = multiply(queries, keys, EXACT) * scale
            has_seen = slots[None, :] <= newest_slots(task, index, WINDOW, GROUP)[:, None]
            total += tl.sum(tl.where(has_seen, tl.exp2(logits - log_sum[:, None]), 0.0), axis=0)
        scores += local_task.to(tl.int64) * (capacity + WINDOW_SCORES)
        tl.store(scores + slots, total, mask=live)


@triton.jit(do_not_specialize=["task_offset", "num_splits", "capacity", "memory"])
def remember_attention(
    kv_pointers,  # [layers] int64, addresses of [blocks, heads, block_size, 2 * D] caches
    block_table,  # [R, columns] int32
    rows,  # [due] int32
    counts,  # [due, 3] int32: budget, sinks, protected
    positions,  # [R] int32 or int64
    scores,  # [tasks, capacity + WINDOW_SCORES] fp32, in: of this window; out: W times the quotient
    task_offset,
    num_splits,
    capacity,
    memory,
    numbers_stride,  # tokens that there is room for in the state: from one number to the other
    num_layers,
    num_kv_heads,
    table_stride,
    block_stride,
    head_stride,
    slot_stride,
    KV_TYPE: tl.constexpr,
    WINDOW_SCORES: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The mean attention since each candidate of a split came, and the numbers that it is of."""
    program = tl.program_id(0)
    split = program % num_splits
    local_task = program // num_splits
    batch = Batch(rows, counts, positions, block_table, table_stride, num_layers, num_kv_heads)
    task = load_task(batch, local_task + task_offset, capacity, WINDOW)
    if task.candidates > 0:
        pages = task_pages(
            task, kv_pointers, block_stride, head_stride, slot_stride, KV_TYPE, BLOCK_SIZE
        )
        scores += local_task.to(tl.int64) * (capacity + WINDOW_SCORES)
        kept = tl.load(task.table_row + KEPT_COLUMN)
        # Before its first eviction a sequence remembers nothing.
        remembered_end = tl.where(task.eviction > 0, task.budget, 0)
        begin, end = split_range(split, num_splits, task.candidates, TILE)
        for start in range(begin, end, TILE):
            slots = start + tl.arange(0, TILE)
            live = slots < end
            # A kept prompt has no numbers.
            has_numbers = live & (slots >= kept) & (slots < task.budget)
            had_numbers = has_numbers & (slots < remembered_end)
            number = slots - kept
            first = number_pointers(
                pages, number, has_numbers, WINDOW, GROUP, HEAD_SIZE, BLOCK_SIZE
            )
            number += numbers_stride
            second = number_pointers(
                pages, number, has_numbers, WINDOW, GROUP, HEAD_SIZE, BLOCK_SIZE
            )
            received = tl.load(scores + slots, mask=live, other=0.0)
            received += memory * tl.load(first, mask=had_numbers, other=0.0)
            asked = WINDOW + memory * tl.load(second, mask=had_numbers, other=0.0)
            tl.store(first, received, mask=has_numbers)
            tl.store(second, asked, mask=has_numbers)
            # Exactly what it was where nothing is remembered.
            tl.store(scores + slots, received * (WINDOW / asked), mask=live)


def remember_launches(
    num_tasks: int,
    arguments: dict[str, Any],
    scoring: dict[str, Any],
    scratch: dict[str, torch.Tensor],
    parameters: EvictionParameters,
) -> Iterator[Launch]:
    """The launches of ``window_scores`` and ``remember_attention``, behind those of the scoring.

    Args:
        num_tasks: heads.
        arguments: those that all kernels have.
        scoring: those that ``row_statistics`` has beside them.
        scratch: the parts of the scratch memory by name.
        parameters: of the eviction.
    """
    arguments = arguments | some(scratch, "scores")
    num_programs = num_tasks * cdiv(parameters.window, scoring["KEY_TILE"])
    # A few products, for which no second program has to share the SM.
    own = dict(QUERY_TILE=min(64, scoring["QUERY_TILE"]), num_stages=1, maxnreg=255)
    yield Launch(window_scores, num_programs, arguments | scoring | own)
    own = {name: scoring[name] for name in ("num_splits", "GROUP", "WINDOW_SCORES")}
    own |= dict(memory=parameters.memory, numbers_stride=parameters.budget, TILE=TILE, num_warps=4)
    yield Launch(remember_attention, num_tasks * scoring["num_splits"], arguments | own)
