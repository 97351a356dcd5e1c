"""Device functions that read a block-table row and address the paged cache.

A row is ``[first, key, budget, kept, token blocks, state blocks]``. Slot s of a sequence lies in
token block ``s // block_size`` at offset ``s % block_size``. The state blocks stand behind the
``ceil(first / block_size)`` token blocks of the first eviction. The query of ring entry w and query
head g of a KV head is vector ``(w % entries) * G + g`` of state block ``w // entries``, where a
block holds ``entries = 2 * block_size // G`` ring entries and a cell of 2 * D elements holds two
vectors. The state blocks behind those of the ring hold fp32 numbers that go along with the tokens,
one after the other through the cells of each KV head (``layout/token_state.py``).

Every cell and vector is aligned to 16 bytes, which the host checks: addresses that come out of
memory carry no alignment, and without the hints below the loads would be one element wide.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from vase_vllm.layout.block_table_row import BlockTableRow

TOKEN_COLUMN = tl.constexpr(BlockTableRow.NUM_HEADER)
"""Column of a row's first token block."""
KEPT_COLUMN = tl.constexpr(BlockTableRow.KEPT)
"""Column of the number of a row's first tokens that are never evicted."""


class Batch(NamedTuple):
    """Arguments of a kernel that say which heads of which sequences may evict.

    Attributes:
        rows: [due] int32.
        counts: [due, 3] int32, budget, sinks and protected of each due row.
        positions: [R] int32 or int64.
        block_table: [R, columns] int32.
        table_stride: elements between two rows of the block table.
        num_layers, num_kv_heads: of this rank; their product is the number of tasks per sequence.
    """

    rows: tl.tensor
    counts: tl.tensor
    positions: tl.tensor
    block_table: tl.tensor
    table_stride: tl.tensor
    num_layers: tl.tensor
    num_kv_heads: tl.tensor


class Task(NamedTuple):
    """One head of one sequence that may be due.

    Attributes:
        table_row: address of the sequence's row in the block table.
        layer, head: of this rank.
        candidates: tokens that may go, 0 if no eviction is due.
        eviction: evictions that the sequence has had before.
        due: index of the sequence among the due rows.
        budget, sinks, protected: of the sequence.
    """

    table_row: tl.tensor
    layer: tl.tensor
    head: tl.tensor
    candidates: tl.tensor
    eviction: tl.tensor
    due: tl.tensor
    budget: tl.tensor
    sinks: tl.tensor
    protected: tl.tensor


class Pages(NamedTuple):
    """The pages of one head of one sequence.

    Attributes:
        base: address of the head in block 0 of the layer's cache; a tensor of them for many heads.
        table_row: address of the sequence's row in the block table.
        block_stride, slot_stride: elements between two blocks, and two cells of a block.
        BLOCK_SIZE: cells of a block.
    """

    base: tl.tensor
    table_row: tl.tensor
    block_stride: tl.tensor
    slot_stride: tl.tensor
    BLOCK_SIZE: tl.constexpr


@triton.jit
def load_task(batch, index, capacity, WINDOW: tl.constexpr):
    """The task of an index, which counts (due row, layer, KV head), the head fastest.

    The row itself says whether an eviction is due; with more candidates than ``capacity`` none is.
    """
    head = index % batch.num_kv_heads
    layer = index // batch.num_kv_heads % batch.num_layers
    due = index // (batch.num_kv_heads * batch.num_layers)
    row = tl.load(batch.rows + due).to(tl.int64)
    counts = batch.counts + due * 3
    budget, sinks, protected = tl.load(counts), tl.load(counts + 1), tl.load(counts + 2)
    table_row = batch.block_table + row * batch.table_stride
    first = tl.load(table_row)
    elapsed = tl.load(batch.positions + row).to(tl.int32) - first
    candidates = tl.where(elapsed == 0, first - WINDOW, budget)
    evicts = (first > 0) & (elapsed >= 0) & (elapsed % WINDOW == 0) & (candidates <= capacity)
    candidates = tl.where(evicts, candidates, 0)
    eviction = elapsed // WINDOW
    return Task(table_row, layer, head, candidates, eviction, due, budget, sinks, protected)


@triton.jit
def task_pages(
    task,
    kv_pointers,  # [layers] int64, addresses of [blocks, heads, block_size, 2 * D] caches
    block_stride,
    head_stride,
    slot_stride,
    KV_TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The pages of a task's head."""
    base = tl.load(kv_pointers + task.layer).to(tl.pointer_type(KV_TYPE))
    base += task.head.to(tl.int64) * head_stride
    return Pages(base, task.table_row, block_stride, slot_stride, BLOCK_SIZE)


@triton.jit
def block_and_cell(pages, slots):
    """Number of the token block of each slot, and its cell in it.

    Slots are not negative, which a signed division cannot know: it takes four instructions more.
    """
    unsigned, block_size = slots.to(tl.uint32), tl.cast(pages.BLOCK_SIZE, tl.uint32)
    return (unsigned // block_size).to(tl.int32), (unsigned % block_size).to(tl.int32)


@triton.jit
def slot_blocks(pages, slots, live):
    """Blocks that slots lie in: int32; 0 where not live."""
    number, _ = block_and_cell(pages, slots)
    return tl.load(pages.table_row + TOKEN_COLUMN + number, mask=live, other=0)


@triton.jit
def cell_pointers(pages, blocks, slots):
    """Addresses of the cells of slots that lie in ``blocks``."""
    _, cell = block_and_cell(pages, slots)
    cells = pages.base + blocks.to(tl.int64) * pages.block_stride + cell * pages.slot_stride
    return tl.multiple_of(cells, 16)


@triton.jit
def slot_pointers(pages, slots, live):
    """Addresses of the cells of slots; of block 0 where not live."""
    return cell_pointers(pages, slot_blocks(pages, slots, live), slots)


@triton.jit
def ring_pointers(
    pages,
    entries,
    heads,  # query head within the group
    live,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """Addresses of query vectors in the ring; of block 0 where not live."""
    ENTRIES: tl.constexpr = 2 * pages.BLOCK_SIZE // GROUP
    num_token_blocks = tl.cdiv(tl.load(pages.table_row), pages.BLOCK_SIZE)
    columns = TOKEN_COLUMN + num_token_blocks + entries // ENTRIES
    blocks = tl.load(pages.table_row + columns, mask=live, other=0).to(tl.int64)
    vectors = entries % ENTRIES * GROUP + heads
    cells = pages.base + blocks * pages.block_stride + vectors // 2 * pages.slot_stride
    return tl.multiple_of(cells + vectors % 2 * HEAD_SIZE, 16)


@triton.jit
def number_pointers(
    pages,
    numbers,  # which of the fp32 numbers
    live,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # that of the pages, which Triton 3.6 takes for a tensor there
):
    """Addresses of fp32 numbers behind the ring; of block 0 where not live."""
    ENTRIES: tl.constexpr = 2 * BLOCK_SIZE // GROUP
    RING_BLOCKS: tl.constexpr = (WINDOW + ENTRIES - 1) // ENTRIES
    BITS: tl.constexpr = pages.base.dtype.element_ty.primitive_bitwidth
    CELL: tl.constexpr = 2 * HEAD_SIZE * BITS // 32
    num_token_blocks = tl.cdiv(tl.load(pages.table_row), BLOCK_SIZE)
    columns = TOKEN_COLUMN + num_token_blocks + RING_BLOCKS + numbers // (CELL * BLOCK_SIZE)
    blocks = tl.load(pages.table_row + columns, mask=live, other=0).to(tl.int64)
    cell = numbers // CELL % BLOCK_SIZE
    cells = pages.base + blocks * pages.block_stride + cell * pages.slot_stride
    return cells.to(tl.pointer_type(tl.float32)) + numbers % CELL


@triton.jit
def load_vectors(
    cells,
    live,
    FIRST: tl.constexpr,  # 0, or the head size for the second vector of a cell
    HEAD_SIZE: tl.constexpr,
):
    """Vectors, padded to a power of two elements; zeros there and where not live."""
    dims = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    mask = live[:, None] & (dims < HEAD_SIZE)[None, :]
    return tl.load(cells[:, None] + (FIRST + dims)[None, :], mask=mask, other=0.0)
