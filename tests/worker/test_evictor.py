"""The CPU path on packed pages against the same eviction on dense tensors."""

from collections import Counter

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops

from tests.oracle.law import chi_square_of_sets, set_probabilities
from tests.support.instruction_sets import require_instruction_set
from tests.support.query_statistics import statistics_file
from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.kernels.torch_eviction import (
    attention_scores,
    plan_moves,
    sampling_noise,
    select_survivors,
    value_range,
)
from vase_vllm.layout.block_table_row import RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.policies.draws import Draws
from vase_vllm.policies.registry import policy_names
from vase_vllm.worker import evictor
from vase_vllm.worker.evictor import TorchEvictor
from vase_vllm.worker.pages import cpu_page_layout
from vase_vllm.worker.query_ring import TorchRingWrite

BLOCK_SIZE, NUM_HEADS, KEY = 32, 2, 1234


class Paged:
    """One sequence in packed pages with NaN everywhere else, and a dense copy of it."""

    def __init__(self, config, isa, dtype, group, num_cached, first, head_size=64):
        torch.manual_seed(0)
        self.config, self.first, self.num_cached = config, first, num_cached
        self.parameters = parameters = config.fused or config.limits
        self.ring = RingLayout(parameters.window, group, BLOCK_SIZE)
        num_state_blocks = config.num_state_blocks(group, BLOCK_SIZE, head_size, dtype)
        self.spec = EvictionSpec(
            block_size=BLOCK_SIZE,
            num_kv_heads=NUM_HEADS,
            head_size=head_size,
            dtype=dtype,
            schedule=EvictionSchedule(parameters.budget, parameters.window),
            num_state_blocks=num_state_blocks,
        )
        self.layout = cpu_page_layout(isa, BLOCK_SIZE, head_size, dtype)
        # Rows still name the blocks that the first eviction has emptied.
        num_token_blocks = -(-max(num_cached, first) // BLOCK_SIZE)
        num_blocks = 3 + num_state_blocks + num_token_blocks
        self.cache = torch.full(
            (num_blocks, NUM_HEADS, BLOCK_SIZE, 2 * head_size), torch.nan, dtype=dtype
        )
        ids = (torch.randperm(num_blocks - 1) + 1)[: num_state_blocks + num_token_blocks]
        self.header = RowHeader(first, KEY, parameters.budget, kept=0)
        self.row = torch.tensor([*self.header, *ids.tolist(), 0, 0], dtype=torch.int32)
        self.blocks = ids[:num_token_blocks]

        self.key, self.value = torch.randn(2, num_cached, NUM_HEADS, head_size).to(dtype)
        key_cache, value_cache = self.cache.view(num_blocks, NUM_HEADS, 2 * BLOCK_SIZE, -1).chunk(
            2, dim=2
        )
        slots = torch.arange(num_cached)
        physical = self.blocks[slots // BLOCK_SIZE] * BLOCK_SIZE + slots % BLOCK_SIZE
        ops.cpu_attn_reshape_and_cache(self.key, self.value, key_cache, value_cache, physical, isa)
        self.query = torch.randn(parameters.window, NUM_HEADS * group, head_size).to(dtype)
        # The ring goes by positions: these are as many as if this were the first eviction.
        positions = np.arange(first - parameters.window, first)
        write = TorchRingWrite.plan(
            self.ring,
            self.row[None].numpy(),
            np.zeros_like(positions),
            positions,
            np.array([first]),
        )
        assert write is not None
        write.store(self.cache, self.query)

    def evictor(self, scale=0.125):
        return TorchEvictor(
            self.config, self.spec, self.ring, self.layout, scale, torch.arange(NUM_HEADS)
        )

    def dense(self):
        """Keys and values in slot order, [slots, H, D], as they lie in the pages now."""
        blocks = self.blocks
        keys, values = (
            torch.cat(list(read(self.cache, blocks)), dim=1).transpose(0, 1)
            for read in (self.layout.keys, self.layout.values)
        )
        return keys[: self.num_cached], values[: self.num_cached]


def expected_eviction(paged, eviction_index, layer_index, scale):
    """The same on the dense copy: [budget, H, D] keys and values."""
    parameters, group = paged.parameters, paged.ring.group_size
    num_candidates = paged.num_cached - parameters.window
    queries = paged.query.unflatten(1, (NUM_HEADS, group)).permute(1, 0, 2, 3).flatten(1, 2)
    scores = attention_scores(
        queries.float(),
        paged.key[:num_candidates].permute(1, 2, 0).float(),
        scale / parameters.temperature,
        parameters.smoothing,
    )
    noise = None
    if parameters.sampling == "gumbel":
        heads = torch.arange(NUM_HEADS)
        noise = sampling_noise(
            parameters.seed, num_candidates, eviction_index, layer_index, heads, KEY
        )
    ranges = value_range(paged.value[:num_candidates]).T
    head, source, destination = plan_moves(
        parameters.budget,
        parameters.window,
        select_survivors(parameters, scores, ranges, noise),
    )
    key, value = paged.key.clone(), paged.value.clone()
    key[destination, head] = paged.key[source, head]
    value[destination, head] = paged.value[source, head]
    return key[: parameters.budget], value[: parameters.budget]


@pytest.mark.parametrize("sampling", ["gumbel", "greedy"])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    ("isa", "dtype"),
    [
        ("vec", torch.float32),
        ("vec", torch.bfloat16),
        ("amx", torch.bfloat16),
        ("vec16", torch.float16),
    ],
    ids=["vec-fp32", "vec-bf16", "amx-bf16", "vec16-fp16"],
)
@pytest.mark.parametrize("num_cached", [112, 230], ids=["steady", "long-prompt"])
def test_paged_equals_dense(isa, dtype, group, sampling, num_cached):
    require_instruction_set(isa, 64, dtype)
    settings = {"budget": 96, "window": 16, "protected": 20, "smoothing": 3, "temperature": 1.5}
    config = EvictionConfig.parse(settings | {"sampling": sampling})
    first = 112 if num_cached == 112 else num_cached
    position = first + (3 * 16 if num_cached == 112 else 0)
    paged = Paged(config, isa, dtype, group, num_cached, first)
    expected = expected_eviction(paged, (position - first) // 16, 5, 0.125)
    before = paged.cache.clone()
    dropped = paged.evictor().evict({5: paged.cache}, paged.row, paged.header, position)
    assert dropped == num_cached - 96
    key, value = paged.dense()
    assert torch.equal(key[:96], expected[0])
    assert torch.equal(value[:96], expected[1])
    # Nothing outside of the sequence's own token blocks has been touched.
    others = torch.ones(len(before), dtype=torch.bool)
    others[paged.blocks] = False
    assert torch.equal(paged.cache[others].nan_to_num(7), before[others].nan_to_num(7))


def test_draws_on_pages_follow_the_law():
    """Which tokens survive in the pages themselves, over many requests' keys."""
    settings = {"budget": 8, "window": 2, "protected": 3, "sinks": 2, "smoothing": 1}
    paged = Paged(EvictionConfig.parse(settings), "vec", torch.float32, 2, 10, 10)
    original = paged.cache.clone()
    queries = paged.query.unflatten(1, (NUM_HEADS, 2)).permute(1, 0, 2, 3).flatten(1, 2)
    weights = attention_scores(queries, paged.key[:8].permute(1, 2, 0), 0.125, 1)
    ranges = value_range(paged.value[:8]).T
    observed = [Counter() for _ in range(NUM_HEADS)]
    rest = []
    for head in range(NUM_HEADS):
        largest = 2 + int(ranges[head, 2:].argmax())
        rest.append([j for j in range(2, 8) if j != largest])
    slot_of = {
        (head, tuple(paged.value[slot, head].tolist())): slot
        for head in range(NUM_HEADS)
        for slot in range(10)
    }
    for key in range(3000):
        paged.cache.copy_(original)
        header = paged.header._replace(key=key)
        paged.evictor().evict({0: paged.cache}, paged.row, header, 10)
        values = paged.dense()[1][:8]
        for head in range(NUM_HEADS):
            kept = {slot_of[head, tuple(v)] for v in values[:, head].tolist()}
            assert {0, 1, 8, 9} <= kept
            drawn = tuple(sorted(rest[head].index(j) for j in kept if j in rest[head]))
            observed[head][drawn] += 1
    for head in range(NUM_HEADS):
        law = set_probabilities(weights[head, rest[head]].tolist(), 3)
        assert chi_square_of_sets(observed[head], law) > 1e-3


@pytest.mark.parametrize("num_candidates", [80, 20_000], ids=["together", "apart"])
def test_layers_that_draw_together_draw_what_each_would_alone(num_candidates):
    limits = EvictionLimits(budget=96, window=16, seed=2**40 + 7)
    layers, heads = [3, 7, 11], torch.arange(NUM_HEADS)
    draws = Draws(limits, KEY, 4, num_candidates, layers, heads)
    for layer in layers:
        alone = sampling_noise(limits.seed, num_candidates, 4, layer, heads, KEY)
        assert torch.equal(draws.of_layers([layer]).gumbel(), alone)


@pytest.mark.parametrize("policy", sorted(policy_names()))
def test_layers_that_are_ranked_together_keep_what_each_would_alone(policy, monkeypatch):
    """Each policy, with draws of its own for each layer, on three layers in stacks of two."""
    settings = {"policy": policy, "budget": 96, "window": 16}
    if policy == "triattention":
        settings["statistics"] = statistics_file(2, 64, layers=12)
    config = EvictionConfig.parse(settings)
    paged = Paged(config, "vec", torch.float32, 2, 112, 112)
    others = [torch.randn_like(paged.cache) for _ in range(2)]
    together, apart = (
        {
            layer: cache.clone()
            for layer, cache in zip((3, 7, 11), [paged.cache, *others], strict=True)
        }
        for _ in range(2)
    )
    num_keys = NUM_HEADS * 64 * 96
    for num_layers, caches in ((2, together), (1, apart)):
        monkeypatch.setitem(evictor._KEYS_TOGETHER, "cpu", num_layers * num_keys)
        paged.evictor().evict(caches, paged.row, paged.header, 112)
    for layer, cache in together.items():
        assert torch.equal(cache.nan_to_num(7), apart[layer].nan_to_num(7))
    assert not torch.equal(together[7], others[0])


@pytest.mark.parametrize("num_cached", [112, 230], ids=["steady", "long-prompt"])
def test_a_policy_reads_the_values_of_the_window(num_cached):
    """On packed pages, where the window begins in the middle of a block."""
    config = EvictionConfig.parse({"budget": 96, "window": 16})
    first = 112 if num_cached == 112 else num_cached
    paged = Paged(config, "vec", torch.bfloat16, 2, num_cached, first)
    found = []

    class Observer:
        def observe(self, candidates, _priority, _keep):
            found.append(candidates.window_values)

    paged.evictor().evict({5: paged.cache}, paged.row, paged.header, first, Observer())
    expected = paged.value[num_cached - 16 :].transpose(0, 1).float()
    assert torch.equal(found[0], expected)
