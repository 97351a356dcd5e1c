"""Kernels that call device functions on their own."""

import triton
import triton.language as tl

from vase_vllm.kernels.paged import Batch, load_task
from vase_vllm.kernels.search import (
    HIGHEST,
    is_selected,
    k_largest,
    load_ordered,
    ordered_bits,
)
from vase_vllm.kernels.selection import gumbel_noise


@triton.jit
def top_k(x, highest, ordered, selected, length, k, SEARCH_TILE: tl.constexpr, TILE: tl.constexpr):
    for start in range(0, length, TILE):
        slots = start + tl.arange(0, TILE)
        live = slots < length
        bits = ordered_bits(tl.load(x + slots, mask=live, other=0.0))
        bits = tl.where(tl.load(highest + slots, mask=live, other=0) > 0, HIGHEST, bits)
        tl.store(ordered + slots, bits.to(tl.int32, bitcast=True), mask=live)
    threshold, tie_end = k_largest(ordered, length, k, SEARCH_TILE, TILE)
    for start in range(0, length, TILE):
        slots = start + tl.arange(0, TILE)
        kept = is_selected(load_ordered(ordered, slots, length), slots, threshold, tie_end)
        tl.store(selected + slots, kept.to(tl.int32), mask=slots < length)


@triton.jit
def draw(words, noise, seed_low, seed_high, eviction, stream, key, TILE: tl.constexpr):
    slots = tl.arange(0, TILE)
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    word, _, _, _ = tl.philox((high << 32) | low, slots, eviction, stream, key)
    tl.store(words + slots, word.to(tl.int64))
    tl.store(noise + slots, gumbel_noise(seed_low, seed_high, slots, eviction, stream, key))


@triton.jit
def tasks(
    rows, counts, positions, block_table, table_stride, candidates, evictions, WINDOW: tl.constexpr
):
    """What an eviction kernel finds due: one program a row, one layer, one head."""
    index = tl.program_id(0)
    batch = Batch(rows, counts, positions, block_table, table_stride, 1, 1)
    task = load_task(batch, index, 1 << 30, WINDOW)
    tl.store(candidates + index, task.candidates)
    tl.store(evictions + index, task.eviction)
