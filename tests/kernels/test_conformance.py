"""Everybody who computes when a sequence evicts and where its tokens lie computes the same.

The closed form over Python's numbers, numpy's and torch's; the remapping kernel; the eviction
kernels, which find out for themselves whether an eviction is due; the block manager, which has to
have a block for every slot. The judge is the authors' schedule, which counts.
"""

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool

from tests.kernels.device_functions import tasks
from tests.support.authors_schedule import play
from vase_vllm.config import EvictionConfig
from vase_vllm.engine.admission import AdmissionContext
from vase_vllm.engine.block_manager import EvictionManager
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.kernels.remap import BatchRemap
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.block_table_row import BlockTableRow
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.plan.cost import num_blocks_held

NUM_PERIODS = 3


class Sequence:
    """One sequence, and its decode steps up to a few evictions, by the authors' schedule.

    Attributes:
        positions: of its decode steps.
        slots: of each.
        evicted_at: tokens cached before the eviction that precedes it, or None.
    """

    def __init__(self, budget: int, window: int, num_prompt: int, block_size: int) -> None:
        self.schedule = EvictionSchedule(budget, window)
        self.num_prompt, self.block_size = num_prompt, block_size
        self.first = self.schedule.first_eviction(num_prompt)
        steps = list(play(budget, window, num_prompt, self.first + NUM_PERIODS * window + 1))
        steps = steps[num_prompt:]
        self.positions = [position for position, _, _ in steps]
        self.slots = [slot for _, slot, _ in steps]
        self.evicted_at = [evicted_at for _, _, evicted_at in steps]

    @property
    def due(self) -> list[bool]:
        return [evicted_at is not None for evicted_at in self.evicted_at]


sequences = st.builds(
    lambda kept, window, num_prompt, block_size: Sequence(
        kept + window, window, num_prompt, block_size
    ),
    kept=st.integers(1, 30),
    window=st.integers(1, 9),
    num_prompt=st.integers(1, 90),
    block_size=st.sampled_from([1, 4, 16]),
)


@given(sequences)
def test_the_closed_form(sequence):
    schedule, first = sequence.schedule, sequence.first
    in_python = [schedule.slots(p, first) for p in sequence.positions]
    assert in_python == sequence.slots
    assert [schedule.due(p, first) for p in sequence.positions] == sequence.due
    for array in (np.array, torch.tensor):
        positions = array(sequence.positions)
        assert schedule.slots(positions, array(first)).tolist() == sequence.slots
        assert schedule.due(positions, array(first)).tolist() == sequence.due
    for position, evicted_at in zip(sequence.positions, sequence.evicted_at, strict=True):
        if evicted_at is not None:
            assert schedule.num_cached(position, first) == evicted_at


@settings(max_examples=25, deadline=None)
@given(sequences)
def test_the_remapping_kernel(sequence):
    """A row for every decode step, whose token blocks are numbered from 1."""
    num_steps, schedule = len(sequence.positions), sequence.schedule
    num_blocks = cdiv(max(sequence.first, schedule.bound), sequence.block_size)
    header = torch.tensor([sequence.first, 0, schedule.budget, 0])
    row = torch.cat([header, torch.arange(1, num_blocks + 1)])
    slot_mapping = torch.full((num_steps,), -1)
    starts, num_cached = torch.zeros(2, num_steps, dtype=torch.int32)
    token_table = torch.zeros(num_steps, num_blocks, dtype=torch.int32)
    BatchRemap(
        query_start_loc=torch.arange(num_steps + 1, dtype=torch.int32),
        seq_lens=torch.tensor(sequence.positions, dtype=torch.int32) + 1,
        block_table=row.int().repeat(num_steps, 1),
        slot_mapping=slot_mapping,
        starts=starts,
        num_cached=num_cached,
        token_table=token_table,
        window=schedule.window,
        block_size=sequence.block_size,
    ).run()
    assert (slot_mapping - sequence.block_size).tolist() == sequence.slots
    assert starts.tolist() == sequence.positions
    assert (num_cached - 1).tolist() == sequence.slots
    for blocks, slot in zip(token_table, sequence.slots, strict=True):
        num_shown = slot // sequence.block_size + 1
        assert blocks[:num_shown].tolist() == list(range(1, num_shown + 1))
        assert not blocks[num_shown:].any()


@settings(max_examples=25, deadline=None)
@given(sequences)
def test_the_eviction_kernels(sequence):
    num_steps, window = len(sequence.positions), sequence.schedule.window
    budget = sequence.schedule.budget
    table = torch.tensor([[sequence.first, 0, budget, 0]], dtype=torch.int32).repeat(num_steps, 1)
    counts = torch.tensor([[budget, 0, 0]], dtype=torch.int32).repeat(num_steps, 1)
    candidates, evictions = torch.full((2, num_steps), -1, dtype=torch.int32)
    tasks[(num_steps,)](
        torch.arange(num_steps, dtype=torch.int32),
        counts,
        torch.tensor(sequence.positions, dtype=torch.int32),
        table,
        table.stride(0),
        candidates,
        evictions,
        WINDOW=window,
    )
    expected = [0 if cached is None else cached - window for cached in sequence.evicted_at]
    assert candidates.tolist() == expected
    due = torch.tensor(sequence.due)
    assert evictions[due].tolist() == list(range(sum(sequence.due)))


@settings(max_examples=50, deadline=None)
@given(sequences)
def test_the_block_manager(sequence):
    schedule, block_size, first = sequence.schedule, sequence.block_size, sequence.first
    ring = RingLayout(schedule.window, group_size=1, block_size=block_size)
    spec = EvictionSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.float32,
        schedule=schedule,
        num_state_blocks=ring.num_blocks,
    )
    pool = BlockPool(1 + ring.num_blocks + cdiv(first, block_size), True, block_size)
    manager = EvictionManager(spec, pool, True, 0, scheduler_block_size=block_size)
    request = SimpleNamespace(
        request_id="request",
        num_prompt_tokens=sequence.num_prompt,
        prompt_token_ids=[2] * sequence.num_prompt,
        num_computed_tokens=0,
        max_tokens=1000,
        sampling_params=None,
    )
    config = EvictionConfig.parse(
        {"policy": "random", "budget": schedule.budget, "window": schedule.window, "sinks": 0}
    )
    manager.bind(AdmissionContext({"request": request}, config, max_model_len=2000))
    manager.allocate_new_blocks("request", sequence.num_prompt, sequence.num_prompt)
    row = manager.req_to_blocks["request"]
    assert row[BlockTableRow.FIRST].block_id == first
    for position, slot in zip(sequence.positions, sequence.slots, strict=True):
        request.num_computed_tokens = position
        # Before a step vLLM takes back what the steps before it no longer need.
        manager.remove_skipped_blocks("request", position, sequence.num_prompt)
        manager.allocate_new_blocks("request", position + 1, position + 1)
        assert not row[BlockTableRow.NUM_HEADER + slot // block_size].is_null
        num_held = sum(not block.is_null for block in row[BlockTableRow.NUM_HEADER :])
        # What the first eviction empties is given back in front of the next step.
        num_tokens = position + (position != first)
        assert num_held == num_blocks_held(num_tokens, block_size, schedule, ring.num_blocks, first)
        if position >= schedule.first_query(first):
            state_column = BlockTableRow.state_column(first, block_size)
            state_blocks = row[state_column : state_column + ring.num_blocks]
            assert len(row) == state_column + len(state_blocks)
            assert not any(block.is_null for block in state_blocks)
    held = [block for block in manager.pop_blocks_for_free("request") if not block.is_null]
    assert len({block.block_id for block in held}) == len(held)
