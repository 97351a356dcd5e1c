"""What of a window's keys and values ``distinctness.py`` measures the others with.

The keys' part is m, the mean of the window's unit keys. The values' part is their whitening.

Per head, with the values of the window as the rows of Y [W, D], and r, which is ``ridge`` times the
mean eigenvalue of ``Y^T Y``::

    B = L^-1 Y  with  L L^T = Y Y^T + r I

Row k of L^-1 has nothing right of its diagonal. So ``L[i, k] = B[k] . Y[i]`` for a later row i, and
the rows of B come one after the other, as in Gram and Schmidt's method, without L or ``Y Y^T``:

    Z[k] = Y[k] - sum_{j < k} L[k, j] B[j],  B[k] = Z[k] / sqrt(Y[k] . Z[k] + r)

A program is a single warp and takes PART rows of Y at a time. It subtracts from them what they have
of all rows of B before them, which it has written, and makes its own rows of B in as many steps
that wait for one another: of 4 operations for each of PART * D numbers.

On an H200, elimination of ``[Y Y^T + r I | Y]`` as a whole, 64 steps of W * (W + D) numbers for
Qwen3-8B, took 128 us for the 288 heads of a sequence with 2 warps, 220 with 4 and 383 with 8
(benchmarks/results/gpu/): in every step all warps wait for one another. This has not been timed.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vase_vllm.kernels.launch import Launch
from vase_vllm.kernels.paged import Batch, load_task, load_vectors, slot_pointers, task_pages
from vase_vllm.kernels.scratch import some

LEAST_LENGTH = tl.constexpr(1e-8)
"""What is added to a key's length, so that a key of zeros is similar to nothing."""
LEAST_FLOOR = tl.constexpr(1e-8)
"""The floor of a window whose values are zeros: what is left then is the plain length."""
MAX_PART = 16
"""More rows at a time take more operations: in each of its steps, all rows of the part do."""


@triton.jit
def window_vectors(
    pages,
    first_slot,
    rows,
    FIRST: tl.constexpr,  # 0 for keys, D for values
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Keys or values [rows, D] of the window in fp32, and their squared lengths.

    Rows beyond the window are zeros, and so are those that are not finite.
    """
    live = rows < WINDOW
    cells = slot_pointers(pages, first_slot + rows, live)
    vectors = load_vectors(cells, live, FIRST, SIZE).to(tl.float32)
    squares = tl.sum(vectors * vectors, axis=1)
    # False for NaN as well.
    is_finite = squares < float("inf")
    return tl.where(is_finite[:, None], vectors, 0.0), tl.where(is_finite, squares, 0.0)


@triton.jit(do_not_specialize=["task_offset", "capacity", "ridge"])
def window_whitening(
    kv_pointers,  # [layers] int64, addresses of [blocks, heads, block_size, 2 * D] caches
    block_table,  # [R, columns] int32
    rows,  # [due] int32
    counts,  # [due, 3] int32: budget, sinks, protected
    positions,  # [R] int32 or int64
    key_means,  # [tasks, D] fp32, out: m
    bases,  # [tasks, W, D] fp32, out: B
    floors,  # [tasks] fp32, out: r
    task_offset,
    capacity,
    ridge,
    num_layers,
    num_kv_heads,
    table_stride,
    block_stride,
    head_stride,
    slot_stride,
    KV_TYPE: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PART: tl.constexpr,
):
    """The mean of the unit keys, the basis and the floor of one head."""
    local_task = tl.program_id(0)
    batch = Batch(rows, counts, positions, block_table, table_stride, num_layers, num_kv_heads)
    task = load_task(batch, local_task + task_offset, capacity, WINDOW)
    if task.candidates > 0:
        pages = task_pages(
            task, kv_pointers, block_stride, head_stride, slot_stride, KV_TYPE, BLOCK_SIZE
        )
        lanes = tl.arange(0, PART)
        dims = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
        has_dim = dims < HEAD_SIZE
        first = task.candidates
        total = tl.zeros([PART], tl.float32)
        unit_sum = tl.zeros([triton.next_power_of_2(HEAD_SIZE)], tl.float32)
        for begin in range(0, WINDOW, PART):
            _, squares = window_vectors(pages, first, begin + lanes, HEAD_SIZE, WINDOW, HEAD_SIZE)
            total += squares
            keys, squares = window_vectors(pages, first, begin + lanes, 0, WINDOW, HEAD_SIZE)
            unit_sum += tl.sum(keys / (tl.sqrt(squares) + LEAST_LENGTH)[:, None], axis=0)
        key_means += local_task.to(tl.int64) * HEAD_SIZE
        tl.store(key_means + dims, unit_sum / WINDOW, mask=has_dim)
        floor = tl.maximum(ridge * tl.sum(total, axis=0) / HEAD_SIZE, LEAST_FLOOR)
        tl.store(floors + local_task, floor)
        bases += local_task.to(tl.int64) * (WINDOW * HEAD_SIZE)
        # No pipeline around the loads of what a round before has stored.
        for begin in tl.range(0, WINDOW, PART, num_stages=1):
            own = begin + lanes
            values, _ = window_vectors(pages, first, own, HEAD_SIZE, WINDOW, HEAD_SIZE)
            left = values
            for row in tl.range(0, begin, num_stages=3):
                basis = tl.load(bases + row * HEAD_SIZE + dims, mask=has_dim, other=0.0)
                factors = tl.sum(values * basis[None, :], axis=1)
                left -= factors[:, None] * basis[None, :]
            for row in tl.range(begin, tl.minimum(begin + PART, WINDOW), num_stages=1):
                is_row = own == row
                vector = tl.sum(tl.where(is_row[:, None], left, 0.0), axis=0)
                products = tl.sum(values * vector[None, :], axis=1)
                # No pivot is below the floor but by rounding, for no eigenvalue is.
                pivot = tl.maximum(tl.sum(tl.where(is_row, products, 0.0), axis=0), 0.0) + floor
                basis = vector / tl.sqrt(pivot)
                tl.store(bases + row * HEAD_SIZE + dims, basis, mask=has_dim)
                factors = tl.where(own > row, products / pivot, 0.0)
                left -= factors[:, None] * vector[None, :]
            tl.debug_barrier()


def whitening_launch(
    num_tasks: int, arguments: dict[str, Any], scratch: dict[str, torch.Tensor], ridge: float
) -> Launch:
    """The launch of ``window_whitening``, which may run beside the scoring of attention.

    Args:
        num_tasks: heads.
        arguments: those that all kernels have.
        scratch: the parts of the scratch memory by name.
        ridge: see ``EvictionParameters``.
    """
    # A warp that is alone waits for no other; two parts are 128 of its registers.
    part = 2048 // triton.next_power_of_2(arguments["HEAD_SIZE"])
    own = dict(ridge=ridge, PART=min(part, MAX_PART), num_warps=1, maxnreg=255)
    arguments = arguments | some(scratch, "key_means", "bases", "floors") | own
    return Launch(window_whitening, num_tasks, arguments, is_beside=True)
