"""Every packing of the CPU backend: probed right, read right, moved right."""

import pytest
import torch
from vllm import _custom_ops as ops

from vase_vllm.pages import cpu_page_layout

BLOCK_SIZE, NUM_BLOCKS, NUM_HEADS = 64, 5, 3
PACKINGS = [("vec", 64), ("vec", 128), ("vec16", 80), ("vec16", 112), ("amx", 64), ("amx", 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=PACKINGS, ids=lambda p: f"{p[0]}-{p[1]}")
def packing(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def written(request, packing):
    """A cache that vLLM has written, and what it should hold: keys and values in slot order."""
    isa, head_size = packing
    dtype = request.param
    torch.manual_seed(0)
    cache = torch.full((NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, 2 * head_size), torch.nan, dtype=dtype)
    shape = (NUM_BLOCKS * BLOCK_SIZE, NUM_HEADS, head_size)
    key, value = torch.randn(2, *shape).to(dtype)
    key_cache, value_cache = cache.view(NUM_BLOCKS, NUM_HEADS, 2 * BLOCK_SIZE, -1).chunk(2, dim=2)
    slots = torch.arange(shape[0])
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
    return cpu_page_layout(isa, BLOCK_SIZE, head_size, dtype), cache, key, value


def by_block(tensor):
    """[slots, H, D] -> [num_blocks, H, block_size, D]."""
    return tensor.unflatten(0, (NUM_BLOCKS, BLOCK_SIZE)).transpose(1, 2)


def test_unpack_gives_what_was_written(written):
    layout, cache, key, value = written
    key_pages, value_pages = layout.split(cache)
    assert torch.equal(layout.keys.unpack(key_pages), by_block(key))
    assert torch.equal(layout.values.unpack(value_pages), by_block(value))


def test_copy_moves_single_tokens_of_single_heads(written):
    layout, cache, key, value = written
    head = torch.tensor([0, 0, 2])
    source = torch.tensor([4, 4, 0]), torch.tensor([7, 63, 1])
    destination = torch.tensor([0, 1, 3]), torch.tensor([3, 0, 33])
    for packing, pages, dense in zip(
        (layout.keys, layout.values), layout.split(cache), (key, value), strict=True
    ):
        expected = by_block(dense).clone()
        for h, sb, st, db, dt in zip(head, *source, *destination, strict=True):
            expected[db, h, dt] = expected[sb, h, st].clone()
        packing.copy(pages, head, source, destination)
        assert torch.equal(packing.unpack(pages), expected)
