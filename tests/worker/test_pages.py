"""Every packing of the CPU backend: probed right, read right, moved right."""

import pytest
import torch
from vllm import _custom_ops as ops

from tests.support.instruction_sets import require_instruction_set
from vase_vllm.worker import pages
from vase_vllm.worker.pages import (
    CandidatePages,
    PackedPages,
    Packing,
    PlainPages,
    cpu_page_layout,
)

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
    require_instruction_set(isa, head_size, dtype)
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


def read(layout, cache):
    """Keys and values of all blocks, each [num_blocks, H, block_size, D]."""
    return [half(cache, torch.arange(NUM_BLOCKS)) for half in (layout.keys, layout.values)]


def check_moves(layout, cache, key, value):
    head = torch.tensor([0, 0, 2])
    source = torch.tensor([4, 4, 0]), torch.tensor([7, 63, 1])
    destination = torch.tensor([0, 1, 3]), torch.tensor([3, 0, 33])
    layout.copy(cache, head, source, destination)
    for dense, moved in zip((key, value), read(layout, cache), strict=True):
        expected = by_block(dense).clone()
        for h, sb, st, db, dt in zip(head, *source, *destination, strict=True):
            expected[db, h, dt] = expected[sb, h, st].clone()
        assert torch.equal(moved, expected)


def test_reading_gives_what_was_written(written):
    layout, cache, key, value = written
    keys, values = read(layout, cache)
    assert torch.equal(keys, by_block(key))
    assert torch.equal(values, by_block(value))


def test_copy_moves_single_tokens_of_single_heads(written):
    check_moves(*written)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_packing_that_no_strides_express(num_layers):
    """Pairs of a key's dimensions lie side by side, token by token, as AMX wants them."""
    torch.manual_seed(0)
    head_size = 8
    tokens, dims = torch.arange(BLOCK_SIZE), torch.arange(head_size)
    packing = Packing(tokens=2 * tokens, dims=dims // 2 * 2 * BLOCK_SIZE + dims % 2)
    offsets = packing.tokens[:, None] + packing.dims
    key, value = torch.randn(2, num_layers, NUM_BLOCKS * BLOCK_SIZE, NUM_HEADS, head_size)
    caches = torch.empty(num_layers, NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, 2 * head_size)
    keys, values = caches.flatten(3).chunk(2, dim=-1)
    keys[..., offsets] = torch.stack([by_block(of_layer) for of_layer in key])
    values[..., offsets] = torch.stack([by_block(of_layer) for of_layer in value])
    layout, blocks, num = PackedPages(packing, packing), torch.tensor([3, 0, 2]), BLOCK_SIZE + 5
    candidates = CandidatePages(layout, list(caches), blocks, num, window=BLOCK_SIZE)
    slots = (blocks[:, None] * BLOCK_SIZE + tokens).flatten()[:num]
    assert torch.equal(candidates.keys(), key[:, slots].permute(0, 2, 3, 1).flatten(0, 1))
    values = torch.cat(list(candidates.values()), dim=1)
    assert torch.equal(values, value[:, slots].transpose(1, 2).flatten(0, 1))
    check_moves(layout, caches[0], key[0], value[0])


def test_values_come_in_parts(monkeypatch):
    """As many blocks at once as the limit allows, and never less than one."""
    torch.manual_seed(0)
    key, value = torch.randn(2, NUM_BLOCKS * BLOCK_SIZE, NUM_HEADS, 64)
    cache = torch.cat([by_block(key), by_block(value)], dim=-1)
    num = 4 * BLOCK_SIZE + 5
    candidates = CandidatePages(PlainPages(), [cache], torch.arange(NUM_BLOCKS), num, window=1)
    for num_blocks, sizes in ((2, [128, 128, 5]), (0.5, [64, 64, 64, 64, 5])):
        limit = int(num_blocks * BLOCK_SIZE * NUM_HEADS * 64)
        monkeypatch.setitem(pages._VALUES_TOGETHER, "cpu", limit)
        parts = list(candidates.values())
        assert [part.shape[1] for part in parts] == sizes
        assert torch.equal(torch.cat(parts, dim=1), value[:num].transpose(0, 1))


@pytest.mark.parametrize("order", ["heads-first", "tokens-first"])
def test_plain_pages_in_any_order_of_strides(order):
    """GPU backends have a page's heads or its tokens first."""
    torch.manual_seed(0)
    key, value = torch.randn(2, NUM_BLOCKS * BLOCK_SIZE, NUM_HEADS, 64)
    cache = torch.cat([by_block(key), by_block(value)], dim=-1)
    if order == "tokens-first":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    check_moves(PlainPages(), cache, key, value)


def test_candidates_stop_before_the_window_whose_values_come_after_them():
    torch.manual_seed(0)
    key, value = torch.randn(2, NUM_BLOCKS * BLOCK_SIZE, NUM_HEADS, 64)
    cache = torch.cat([by_block(key), by_block(value)], dim=-1)
    blocks, num = torch.tensor([3, 0, 2]), BLOCK_SIZE + 5
    candidates = CandidatePages(PlainPages(), [cache], blocks, num, window=BLOCK_SIZE)
    slots = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
    window = slots[num : num + BLOCK_SIZE]
    assert torch.equal(candidates.window_values(), value[window].transpose(0, 1))
    slots = slots[:num]
    assert torch.equal(candidates.keys(), key[slots].permute(1, 2, 0))
    values = torch.cat(list(candidates.values()), dim=1)
    assert torch.equal(values, value[slots].transpose(0, 1))
