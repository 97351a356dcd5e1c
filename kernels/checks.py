"""Checks that the operations share; every message names the argument that is wrong."""

import torch

from vase_vllm.kernels.launch import HEAD_SIZES
from vase_vllm.kernels.parameters import Scoring
from vase_vllm.layout.query_ring import RingLayout

CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_GROUP_SIZE = 16


def misfit(head_size: int, group_size: int) -> str | None:
    """Why the kernels cannot take a layer of this shape, in one line, or None.

    Args:
        head_size: D of keys and values.
        group_size: query heads per KV head.
    """
    if head_size not in HEAD_SIZES:
        return f"head size {head_size} is not one of {', '.join(map(str, HEAD_SIZES))}"
    if not 1 <= group_size <= MAX_GROUP_SIZE:
        return f"{group_size} query heads per KV head are not 1 to {MAX_GROUP_SIZE}"
    return None


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise ValueError unless a tensor is contiguous and has this shape, dtype and device."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must be {expected}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like kv_cache, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def check_cache(kv_cache: torch.Tensor) -> None:
    """Raise ValueError unless the kernels can address the cache.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * D] bf16, fp16 or fp32; its last
            dimension is contiguous, its address and strides are multiples of 16 bytes.
    """
    if kv_cache.dim() != 4:
        raise ValueError(
            "kv_cache must be [num_blocks, num_kv_heads, block_size, 2 * head_size], "
            f"got {kv_cache.dim()} dimensions"
        )
    block_size, pair_size = kv_cache.shape[2:]
    if kv_cache.dtype not in CACHE_DTYPES:
        raise ValueError(f"kv_cache must be bf16, fp16 or fp32, got {kv_cache.dtype}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"kv_cache: block size must be one of {BLOCK_SIZES}, got {block_size}")
    if pair_size % 2 or pair_size // 2 not in HEAD_SIZES:
        raise ValueError(f"kv_cache: head size must be one of {HEAD_SIZES}, got {pair_size / 2:g}")
    if kv_cache.stride(3) != 1:
        raise ValueError("kv_cache must be contiguous in its last dimension")
    sizes = (kv_cache.data_ptr(), *(s * kv_cache.element_size() for s in kv_cache.stride()[:3]))
    if any(size % 16 for size in sizes):
        raise ValueError("kv_cache: its address and strides must be multiples of 16 bytes")
    if kv_cache.device.type == "cpu" and not interpreted():
        raise ValueError("kv_cache must be on a GPU, or Triton be imported under its interpreter")


def check_block_table(block_table: torch.Tensor, device: torch.device) -> None:
    """Raise ValueError unless a block table is [R, columns] int32 with contiguous rows."""
    if block_table.dim() != 2 or block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError(
            "block_table must be [R, columns] int32 with contiguous rows, got "
            f"{tuple(block_table.shape)} {block_table.dtype}"
        )
    if block_table.device != device:
        raise ValueError(f"block_table must be on {device} like kv_cache, got {block_table.device}")


def check_ring(window: int, group_size: int, block_size: int) -> None:
    """Raise ValueError unless blocks of this size hold a ring of this window and group."""
    if not 1 <= group_size <= MAX_GROUP_SIZE:
        raise ValueError(f"group_size must be in [1, {MAX_GROUP_SIZE}], got {group_size}")
    if reason := RingLayout(window, group_size, block_size).misfit():
        raise ValueError(reason)


def check_slot_priority(
    slot_priority: torch.Tensor | None,
    scoring: Scoring,
    num_due: int,
    num_candidates: int,
    device: torch.device,
) -> None:
    """Raise ValueError unless the priorities are given exactly if ``scoring`` reads them.

    Args:
        slot_priority: [num_due, num_candidates or more] int32.
    """
    if slot_priority is None:
        if scoring == "age":
            raise ValueError("slot_priority must be given with scoring 'age'")
        return
    if scoring != "age":
        raise ValueError(f"slot_priority must be None with scoring {scoring!r}")
    if slot_priority.dim() != 2 or slot_priority.shape[1] < num_candidates:
        raise ValueError(
            f"slot_priority must have shape ({num_due}, {num_candidates} or more), "
            f"got {tuple(slot_priority.shape)}"
        )
    shape = num_due, slot_priority.shape[1]
    check_tensor("slot_priority", slot_priority, shape, (torch.int32,), device)


def interpreted() -> bool:
    """Whether the kernels were defined under Triton's interpreter, which runs them on a CPU."""
    from triton.runtime.interpreter import InterpretedFunction

    from vase_vllm.kernels.scoring import row_statistics

    return isinstance(row_statistics, InterpretedFunction)
