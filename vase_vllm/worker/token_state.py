"""Reads and writes the numbers that a policy keeps of each token, in the pages of a layer."""

import torch
from torch.nn.functional import pad

from vase_vllm.layout.token_state import TokenStateLayout


def load_numbers(
    layout: TokenStateLayout, kv_cache: torch.Tensor, state_blocks: torch.Tensor
) -> torch.Tensor:
    """The numbers of the tokens that a sequence held after its last eviction.

    Args:
        kv_cache: [num_blocks, H, block_size, 2 * D], the last dimension contiguous.
        state_blocks: [layout.num_blocks] int64, of the sequence.

    Returns:
        [H, num_numbers, budget] fp32, in slot order, without the slots of a kept prompt.
    """
    pages = kv_cache.view(torch.float32)[state_blocks].transpose(0, 1).flatten(1)
    shape = layout.num_numbers, layout.budget
    return pages[:, : layout.num_numbers * layout.budget].unflatten(1, shape)


def store_numbers(
    layout: TokenStateLayout,
    kv_cache: torch.Tensor,
    state_blocks: torch.Tensor,
    numbers: torch.Tensor,
) -> None:
    """Write what :func:`load_numbers` will read.

    Args:
        kv_cache: [num_blocks, H, block_size, 2 * D], written in place.
        state_blocks: [layout.num_blocks] int64, of the sequence.
        numbers: [H, num_numbers, at most budget] fp32.
    """
    cells = kv_cache.view(torch.float32)
    _, num_heads, block_size, cell_size = cells.shape
    rows = pad(numbers, (0, layout.budget - numbers.shape[-1])).flatten(1)
    rows = pad(rows, (0, len(state_blocks) * block_size * cell_size - rows.shape[1]))
    pages = rows.view(num_heads, len(state_blocks), block_size, cell_size)
    cells[state_blocks] = pages.transpose(0, 1)
