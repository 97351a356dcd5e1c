"""Where things lie: device functions that read a block-table row and address the paged cache.

A row is ``[first, key, state blocks, token blocks]``. Slot s of a sequence lies in token block
``s // block_size`` at offset ``s % block_size``. The query of ring entry w and query head g of a KV
head is vector ``(w % entries) * G + g`` of state block ``w // entries``, where a block holds
``entries = 2 * block_size // G`` ring entries and a cell of 2 * D elements holds two vectors.

Every cell and vector is aligned to 16 bytes, which the host checks: addresses that come out of
memory carry no alignment, and without the hints below the loads would be one element wide.
"""

import triton
import triton.language as tl


@triton.jit
def load_task(
    task,  # (due row, layer, KV head), the head fastest
    rows,  # [due] int32
    positions,  # [R] int32 or int64
    block_table,  # [R, columns] int32
    table_stride,
    num_layers,
    num_kv_heads,
    budget,
    capacity,
    WINDOW: tl.constexpr,
):
    """Decode a task and decide from its row whether an eviction is due.

    Returns:
        (row pointer, layer, head, candidates, eviction index); candidates is 0 if none is due.
    """
    head = task % num_kv_heads
    layer = task // num_kv_heads % num_layers
    row = tl.load(rows + task // (num_kv_heads * num_layers)).to(tl.int64)
    table_row = block_table + row * table_stride
    first = tl.load(table_row)
    elapsed = tl.load(positions + row).to(tl.int32) - first
    candidates = tl.where(elapsed == 0, first - WINDOW, budget)
    due = (first > 0) & (elapsed >= 0) & (elapsed % WINDOW == 0) & (candidates <= capacity)
    return table_row, layer, head, tl.where(due, candidates, 0), elapsed // WINDOW


@triton.jit
def head_base(kv_pointers, layer, head, head_stride, KV_TYPE: tl.constexpr):
    """Address of a KV head in block 0 of a layer's cache."""
    return (
        tl.load(kv_pointers + layer).to(tl.pointer_type(KV_TYPE)) + head.to(tl.int64) * head_stride
    )


@triton.jit
def slot_pointers(
    base, table_row, slots, live, token_column, block_stride, slot_stride, BLOCK_SIZE: tl.constexpr
):
    """Addresses of the cells of slots; of block 0 where not live."""
    blocks = tl.load(table_row + token_column + slots // BLOCK_SIZE, mask=live, other=0)
    cells = base + blocks.to(tl.int64) * block_stride + (slots % BLOCK_SIZE) * slot_stride
    return tl.multiple_of(cells, 16)


@triton.jit
def ring_pointers(
    base,
    table_row,
    entries,
    heads,  # query head within the group
    live,
    state_column,
    block_stride,
    slot_stride,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Addresses of query vectors in the ring; of block 0 where not live."""
    ENTRIES: tl.constexpr = 2 * BLOCK_SIZE // GROUP
    blocks = tl.load(table_row + state_column + entries // ENTRIES, mask=live, other=0)
    vectors = entries % ENTRIES * GROUP + heads
    cells = base + blocks.to(tl.int64) * block_stride + (vectors // 2) * slot_stride
    return tl.multiple_of(cells + vectors % 2 * HEAD_SIZE, 16)
