"""How unlike the window the candidates are: what ``distinctness`` adds to the scoring.

Per head, with n candidates, the values of the window as the rows of Y [W, D], and a floor r, which
is ``ridge`` times the mean eigenvalue of ``Y^T Y``:

    m = mean over the window of k / (|k| + 1e-8),  similarity[j] = k[j] . m / (|k[j]| + 1e-8)
    length[j]^2 = (|v[j]|^2 - |B v[j]|^2) / r,  B = L^-1 Y with L L^T = Y Y^T + r I
    distinctness[j] = (1 - similarity[j]) * (max_d v[j] - min_d v[j]) * length[j]

``torch_distinctness.py`` is the same in plain torch, and says where it comes from.

1. ``row_statistics`` as ever; ``candidate_scores`` leaves V alone.
2. ``window_whitening`` makes m, B and r beside these, see ``whitening.py``.
3. ``token_distinctness``: reads K and V, multiplies V with B on tensor cores, and writes the
   distinctness in the place of the value range.

Cost of one head with n = 4096, W = 64, D = 128 in bf16, beside that of ``scoring.py`` and
``whitening.py``: 1 MiB of K, and 2 * 2 * 64 * 128 * 4096 = 134 MFLOP for B v.

V is multiplied with B as the sum of two numbers of the cache's dtype, which V has already: of B
count 16 bits in bf16 and 22 in fp16. One bf16 number would not do, for the difference of the
squares loses the digits of ``(largest eigenvalue + r) / r``, which is up to ``D / ridge + 1``:
1281 with a ridge of 0.1.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from vase_vllm.kernels.launch import (
    DeviceLimits,
    Launch,
    distinctness_tile,
)
from vase_vllm.kernels.paged import (
    Batch,
    cell_pointers,
    load_task,
    load_vectors,
    slot_blocks,
    task_pages,
)
from vase_vllm.kernels.scoring import multiply, row_range, split_range
from vase_vllm.kernels.scratch import some
from vase_vllm.kernels.search import HIGHEST, ordered_bits
from vase_vllm.kernels.whitening import LEAST_LENGTH
from vase_vllm.layout.arithmetic import cdiv


@triton.jit
def load_basis(bases, first_row, WINDOW: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Rows [ROWS, D] of a head's basis, zeros beyond the window: fp32."""
    rows = first_row + tl.arange(0, ROWS)
    dims = tl.arange(0, triton.next_power_of_2(SIZE))
    mask = (rows < WINDOW)[:, None] & (dims < SIZE)[None, :]
    return tl.load(bases + rows[:, None] * SIZE + dims[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["task_offset", "num_splits", "capacity", "chunk"])
def token_distinctness(
    kv_pointers,  # [layers] int64, addresses of [blocks, heads, block_size, 2 * D] caches
    block_table,  # [R, columns] int32
    rows,  # [due] int32
    counts,  # [due, 3] int32: budget, sinks, protected
    positions,  # [R] int32 or int64
    key_means,  # [tasks, D] fp32: m
    bases,  # [tasks, W, D] fp32: B
    floors,  # [tasks] fp32: r
    ordered,  # [tasks, capacity] int32, out: ordered bits of the distinctness
    task_offset,
    num_splits,
    capacity,
    chunk,  # which ROW_TILE of the basis; launched in order, each takes from what is left
    num_layers,
    num_kv_heads,
    table_stride,
    block_stride,
    head_stride,
    slot_stride,
    KV_TYPE: tl.constexpr,
    EXACT: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
):
    """The distinctness of the candidates of one split; those of the sinks rank highest."""
    NUM_CHUNKS: tl.constexpr = (WINDOW + ROW_TILE - 1) // ROW_TILE
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
        out = local_task.to(tl.int64) * capacity
        bases += local_task.to(tl.int64) * (WINDOW * HEAD_SIZE)
        if tl.float32 != KV_TYPE:
            basis = load_basis(bases, chunk * ROW_TILE, WINDOW, ROW_TILE, HEAD_SIZE)
            high = basis.to(KV_TYPE)
            low = (basis - high.to(tl.float32)).to(KV_TYPE)
            # Transposed here, they are copied to shared memory once, and not in every round.
            high, low = tl.trans(high), tl.trans(low)
        floor = tl.load(floors + local_task)
        key_means += local_task.to(tl.int64) * HEAD_SIZE
        key_mean = tl.load(key_means + dims, mask=dims < HEAD_SIZE, other=0.0)
        begin, end = split_range(split, num_splits, task.candidates, KEY_TILE)
        lanes = tl.arange(0, KEY_TILE)
        blocks = slot_blocks(pages, begin + lanes, begin + lanes < end)
        for start in tl.range(begin, end, KEY_TILE, num_stages=3):
            slots = start + lanes
            live = slots < end
            cells = cell_pointers(pages, blocks, slots)
            # The next tile's, so that two tiles can be on their way while this one is worked on.
            ahead = slots + KEY_TILE
            blocks = slot_blocks(pages, ahead, ahead < end)
            vectors = load_vectors(cells, live, HEAD_SIZE, HEAD_SIZE)
            if tl.float32 == KV_TYPE:
                # In the loop: operands of fp32 products that outlive it would fill the registers.
                basis = load_basis(bases, chunk * ROW_TILE, WINDOW, ROW_TILE, HEAD_SIZE)
                parts = multiply(vectors, tl.trans(basis), EXACT)
            else:
                parts = multiply(vectors, high, EXACT)
                parts += multiply(vectors, low, EXACT)
            values = vectors.to(tl.float32)
            left = tl.sum(values * values, axis=1)
            if NUM_CHUNKS > 1:
                before = tl.load(ordered + out + slots, mask=live, other=0)
                left = tl.where(chunk > 0, before.to(tl.float32, bitcast=True), left)
            left -= tl.sum(parts * parts, axis=1)
            square = tl.maximum(left / floor, 0.0, propagate_nan=tl.PropagateNan.ALL)
            # The last chunk alone needs it, the only one up to a window of 64.
            keys = load_vectors(cells, live, 0, HEAD_SIZE).to(tl.float32)
            key_length = tl.sqrt(tl.sum(keys * keys, axis=1)) + LEAST_LENGTH
            similarity = tl.sum(keys * key_mean[None, :], axis=1) / key_length
            value_range = row_range(values, dims < HEAD_SIZE)
            bits = ordered_bits((1.0 - similarity) * value_range * tl.sqrt(square))
            bits = tl.where(slots < task.sinks, HIGHEST, bits)
            if NUM_CHUNKS > 1:
                bits = tl.where(chunk < NUM_CHUNKS - 1, left.to(tl.uint32, bitcast=True), bits)
            tl.store(ordered + out + slots, bits.to(tl.int32, bitcast=True), mask=live)


def token_launches(
    num_programs: int,
    arguments: dict[str, Any],
    scratch: dict[str, torch.Tensor],
    limits: DeviceLimits,
) -> Iterator[Launch]:
    """The launches of ``token_distinctness``, one tile of the basis after the other.

    Args:
        num_programs: heads times splits.
        arguments: those that all kernels have which read K or V.
        scratch: the parts of the scratch memory by name.
        limits: of the device.
    """
    window, head_size = arguments["WINDOW"], arguments["HEAD_SIZE"]
    tile = distinctness_tile(window, head_size, element_size(arguments), limits)
    own = dict(ROW_TILE=tile.rows, KEY_TILE=tile.keys, num_warps=tile.num_warps, maxnreg=255)
    parts = some(scratch, "key_means", "bases", "floors", "ordered")
    for chunk in range(cdiv(window, tile.rows)):
        of_chunk = arguments | parts | own | dict(chunk=chunk)
        yield Launch(token_distinctness, num_programs, of_chunk, needs_beside=chunk == 0)


def element_size(arguments: dict[str, Any]) -> int:
    """Bytes of an element of the cache that the arguments of a kernel are for."""
    num_bits: int = arguments["KV_TYPE"].primitive_bitwidth
    return num_bits // 8
