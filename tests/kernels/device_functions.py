"""Kernels that call device functions on their own."""

import triton
import triton.language as tl

from vase_vllm.kernels.paged import Batch, load_task
from vase_vllm.kernels.selection import gumbel_noise, kth_largest, ordered_bits, select_tile


@triton.jit
def top_k(x, ordered, selected, length, k, TILE: tl.constexpr):
    for start in range(0, length, TILE):
        slots = start + tl.arange(0, TILE)
        values = tl.load(x + slots, mask=slots < length, other=0.0)
        bits = ordered_bits(values).to(tl.int32, bitcast=True)
        tl.store(ordered + slots, bits, mask=slots < length)
    threshold, ties = kth_largest(ordered, length, k, TILE)
    seen = 0
    for start in range(0, length, TILE):
        slots = start + tl.arange(0, TILE)
        bits = tl.load(ordered + slots, mask=slots < length, other=0).to(tl.uint32, bitcast=True)
        kept, seen = select_tile(bits, slots < length, threshold, ties, seen)
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
