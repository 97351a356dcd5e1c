"""How an eviction is divided into programs; which arguments are rejected."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from vase_vllm.kernels import checks, launch
from vase_vllm.kernels.distinctness import token_distinctness
from vase_vllm.kernels.evict import PagedEviction
from vase_vllm.kernels.launch import (
    HEAD_SIZES,
    DeviceLimits,
    Launch,
    device_limits,
    plan_launch,
    run_launches,
    scoring_tile,
    scratch_size,
)
from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.kernels.scoring import candidate_scores, row_statistics
from vase_vllm.kernels.scratch import SCRATCH_BYTES, HeadScratch
from vase_vllm.kernels.selection import select_and_move
from vase_vllm.kernels.whitening import window_whitening
from vase_vllm.layout.arithmetic import cdiv

H200 = DeviceLimits(num_sms=132, shared_memory=227 * 1024, capability=9)
RTX = DeviceLimits(num_sms=170, shared_memory=99 * 1024, capability=12)
QWEN3_8B = HeadScratch(num_rows=256)


@pytest.mark.parametrize("limits", [H200, RTX], ids=["h200", "rtx"])
@pytest.mark.parametrize("group_size", [1, 4, 5, 16], ids="G={}".format)
@pytest.mark.parametrize("head_size", HEAD_SIZES, ids="D={}".format)
def test_tile_fits(head_size, group_size, limits):
    tile = scoring_tile(64 * group_size, head_size, 2, limits)
    padded = 1 << (head_size - 1).bit_length()
    num_tiles = 3 if limits is H200 else 2
    needed = (tile.queries + num_tiles * tile.keys) * padded * 2
    assert needed * tile.programs_per_sm <= limits.shared_memory
    assert tile.queries >= min(64, 64 * group_size)


def test_a_layer_fits_if_the_kernels_take_it(monkeypatch):
    """Every head and group size: what is said at start-up is what the launches check."""
    monkeypatch.setattr(checks, "interpreted", lambda: True)
    parameters = EvictionParameters(budget=40, window=8, protected=4, sinks=1)
    for head_size in range(32, 257, 8):
        cache = torch.empty(3, 1, 32, 2 * head_size)
        for group_size in range(1, 65):
            eviction = PagedEviction(
                torch.tensor([cache.data_ptr()]),
                cache,
                torch.zeros(1, dtype=torch.int32),
                torch.zeros(1, 20, dtype=torch.int32),
                torch.zeros(1, dtype=torch.int32),
                torch.zeros(1, dtype=torch.int32),
                parameters,
                group_size=group_size,
                softmax_scale=1.0,
                max_num_cached=48,
            )
            takes = nullcontext()
            if checks.misfit(head_size, group_size):
                takes = pytest.raises(ValueError, match=r"head size|group_size")
            with takes:
                eviction.check()


def test_two_programs_of_the_qwen3_8b_shape_share_an_sm():
    tile = scoring_tile(256, 128, 2, H200)
    assert (tile.queries, tile.programs_per_sm) == (256, 2)


def plan(num_tasks, max_candidates=4096, scratch_bytes=SCRATCH_BYTES, **splits):
    """Of Qwen3-8B on an H200."""
    tile = scoring_tile(256, 128, 2, H200)
    return plan_launch(num_tasks, max_candidates, QWEN3_8B, scratch_bytes, tile, H200, **splits)


def test_few_heads_are_split_and_many_are_not():
    assert plan(288).num_splits == 4
    assert plan(64 * 288).num_splits == 1
    # No more than there are K tiles.
    assert plan(1, max_candidates=3 * 64).num_splits == 3
    assert plan(288, num_splits=7).num_splits == 7


def test_what_scores_no_attention_is_not_split():
    tile = scoring_tile(0, 128, 2, H200)
    plan = plan_launch(288, 4096, HeadScratch(), SCRATCH_BYTES, tile, H200)
    assert plan.num_splits == 1


def test_four_due_sequences_are_one_launch():
    """The scratch memory holds the splits that are used, not as many as there may be."""
    four = plan(4 * 288)
    assert four.tasks_per_launch == 4 * 288
    assert four.scratch_bytes == 4 * 288 * 8 * (4096 + four.num_splits * 256) <= SCRATCH_BYTES
    # With all splits they would not fit.
    assert plan(4 * 288, num_splits=16).tasks_per_launch < 4 * 288


def test_the_choice_is_the_fastest_of_all():
    """By the stated cost, over launches and splits together."""
    for num_tasks in (1, 36, 288, 1152, 4000, 18432):
        for scratch_bytes in (2**20, 2**23, SCRATCH_BYTES):
            costs = {}
            for splits in range(1, 17):
                fit = scratch_bytes // (8 * (4096 + 256 * splits))
                launches = cdiv(num_tasks, min(num_tasks, fit))
                turns = launches * cdiv(cdiv(num_tasks, launches) * splits, 132)
                costs[splits] = turns * (cdiv(64, splits) + 2)
            chosen = plan(num_tasks, scratch_bytes=scratch_bytes).num_splits
            assert costs[chosen] == min(costs.values())


def test_limits_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(
        multi_processor_count=132, shared_memory_per_block_optin=227 * 1024, major=9
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert device_limits.__wrapped__(torch.device("cuda:0")) == H200


@pytest.mark.parametrize("num_candidates", [4096, 131072], ids="n={}".format)
@pytest.mark.parametrize("num_due", [1, 64], ids="due={}".format)
def test_scratch_is_bounded_and_linear(num_due, num_candidates):
    planned = plan(num_due * 288, num_candidates)
    assert planned.scratch_bytes <= SCRATCH_BYTES
    assert planned.capacity >= num_candidates
    of_task = 8 * (planned.capacity + planned.num_splits * 256)
    assert planned.scratch_bytes == planned.tasks_per_launch * of_task


def test_the_size_of_the_scratch_memory():
    # Of a small model all that it can ever need, of a large one no more than is worth having.
    assert scratch_size(4 * 2, 24, HeadScratch()) == 4 * 2 * 8 * 32
    assert scratch_size(4 * 2, 24, HeadScratch(16)) == 4 * 2 * 8 * (32 + 16 * 16)
    assert scratch_size(256 * 288, 40896, QWEN3_8B) == SCRATCH_BYTES
    # Never too little for one head.
    assert scratch_size(1, 2**24, QWEN3_8B) > SCRATCH_BYTES
    assert plan(288, 2**24, scratch_size(288, 2**24, QWEN3_8B)).tasks_per_launch == 1


def test_distinctness_needs_more_scratch_memory():
    """The mean of the window's keys, a basis and its floor."""
    parameters = EvictionParameters(40, 8, 10)
    assert HeadScratch.of(parameters, group_size=2, head_size=64) == HeadScratch(num_rows=16)
    head = HeadScratch.of(replace(parameters, protect_by="distinctness"), 2, 64)
    more = 4 * (64 + 8 * 64 + 1)
    assert head.num_bytes(48, num_splits=3) == HeadScratch(16).num_bytes(48, 3) + more
    parts = head.divide(torch.zeros(5 * head.num_bytes(48, 3) + 7, dtype=torch.uint8), 5, 48, 3)
    starts = [part.data_ptr() for part in parts.values()]
    ends = [part.data_ptr() + 4 * part.numel() for part in parts.values()]
    assert starts[1:] == ends[:-1], "none overlaps another"
    assert all((start - starts[0]) % 64 == 0 for start in starts)


def test_scratch_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="scratch of 1000 bytes is too small for 4096"):
        plan(1, scratch_bytes=1000)


PARAMETERS = EvictionParameters(40, 8, 10)
UNIFORM = EvictionParameters(40, 8, 4, scoring="uniform")
AGED = dict(parameters=EvictionParameters(40, 8, 4, sampling="greedy", scoring="age"))


def priorities(*shape, dtype=torch.int32):
    return dict(slot_priority=torch.zeros(shape, dtype=dtype))


def arguments():
    return dict(
        kv_pointers=torch.zeros(1, dtype=torch.int64),
        kv_cache=torch.zeros(10, 2, 16, 128),
        layer_indices=torch.zeros(1, dtype=torch.int32),
        block_table=torch.zeros(3, 8, dtype=torch.int32),
        rows=torch.zeros(1, dtype=torch.int32),
        positions=torch.zeros(3, dtype=torch.int32),
        parameters=PARAMETERS,
        group_size=2,
        softmax_scale=0.125,
        max_num_cached=48,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kv_cache=torch.zeros(10, 2, 16)), "kv_cache must be .num_blocks"),
        (dict(kv_cache=torch.zeros(10, 2, 16, 160)), "head size must be one of"),
        (dict(kv_cache=torch.zeros(10, 2, 8, 128)), "block size must be one of"),
        (dict(kv_cache=torch.zeros(10, 2, 16, 128).double()), "kv_cache must be bf16, fp16"),
        (dict(kv_cache=torch.zeros(10, 2, 16, 256)[..., ::2]), "contiguous in its last"),
        (dict(kv_cache=torch.zeros(10, 2, 16, 130)[..., 1:129]), "multiples of 16 bytes"),
        (dict(kv_pointers=torch.zeros(1)), "kv_pointers must be torch.int64"),
        (dict(layer_indices=torch.zeros(2).int()), "layer_indices must have shape"),
        (dict(block_table=torch.zeros(3, 8)), "block_table must be"),
        (dict(rows=torch.zeros(1)), "rows must be torch.int32"),
        (dict(rows=torch.zeros(1).int().to("meta")), "rows must be on cpu"),
        (dict(positions=torch.zeros(2).int()), "positions must have shape"),
        (dict(group_size=0), "group_size must be in"),
        (dict(group_size=17), "group_size must be in"),
        (dict(max_num_cached=100), "max_num_cached .100. is more than a row"),
        (dict(num_splits=17), "num_splits must be in"),
        (dict(scratch=torch.zeros(10)), "scratch must be torch.uint8"),
        (priorities(1, 40), "slot_priority must be None with scoring 'attention'"),
        (AGED, "slot_priority must be given with scoring 'age'"),
        (AGED | priorities(40), "slot_priority must have shape .1, 40 or more"),
        (AGED | priorities(1, 39), "slot_priority must have shape .1, 40 or more"),
        (AGED | priorities(2, 40), "slot_priority must have shape .1, 40."),
        (AGED | priorities(1, 40, dtype=torch.float32), "slot_priority must be torch.int32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_by_name(changes, message, monkeypatch):
    monkeypatch.setattr("vase_vllm.kernels.checks.interpreted", lambda: True)
    with pytest.raises(ValueError, match=message):
        PagedEviction(**(arguments() | changes)).run()


def test_refuses_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr("vase_vllm.kernels.checks.interpreted", lambda: False)
    with pytest.raises(ValueError, match="kv_cache must be on a GPU"):
        PagedEviction(**arguments()).run()


@pytest.mark.parametrize(
    ("changes", "num_scoring"),
    [
        ({}, 2),
        (dict(parameters=replace(PARAMETERS, protect_by="distinctness")), 4),
        (dict(parameters=UNIFORM), 0),
        (AGED | priorities(1, 40), 0),
    ],
    ids=["attention", "distinctness", "uniform", "age"],
)
def test_attention_alone_is_scored(changes, num_scoring):
    launches = list(PagedEviction(**(arguments() | changes)).launches(H200))
    assert len(launches) == num_scoring + 1
    assert launches[-1].kernel is select_and_move


@pytest.mark.parametrize(
    ("budget", "expected"), [(40, 1024), (1025, 2048), (4096, 4096), (8192, 4096)]
)
def test_candidates_that_are_searched_in_registers(budget, expected):
    """As many as the server's budget, so that one kernel is compiled for all sequences."""
    parameters = replace(PARAMETERS, budget=budget)
    *_, selection = PagedEviction(**arguments() | dict(parameters=parameters)).launches(H200)
    assert selection.arguments["SEARCH_TILE"] == expected


# Launches beside others


@dataclass
class FakeGpu:
    """Streams that note what is launched in them, and what waits for what.

    Attributes:
        current: name of torch's current stream.
    """

    events: list[str] = field(default_factory=list)
    current: str = "main"

    def stream_of(self, name: str) -> SimpleNamespace:
        def wait_stream(other: SimpleNamespace) -> None:
            self.events.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=wait_stream)

    @contextmanager
    def in_stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def kernel(self, name: str) -> dict:
        return {(1,): lambda: self.events.append(f"{name} in {self.current}")}


def test_a_launch_beside_others_waits_and_is_waited_for(monkeypatch):
    """Before it comes all that was launched before; what reads its output comes after it."""
    gpu = FakeGpu()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: gpu.stream_of(gpu.current))
    monkeypatch.setattr(torch.cuda, "stream", gpu.in_stream)
    monkeypatch.setattr(launch, "side_stream", lambda device: gpu.stream_of("side"))
    launches = [
        Launch(gpu.kernel("a"), 1, {}),
        Launch(gpu.kernel("b"), 1, {}, is_beside=True),
        Launch(gpu.kernel("c"), 1, {}),
        Launch(gpu.kernel("d"), 1, {}, needs_beside=True),
        Launch(gpu.kernel("e"), 1, {}),
    ]
    run_launches(launches, torch.device("cuda"))
    assert gpu.events == [
        "a in main",
        "side waits for main",
        "b in side",
        "c in main",
        "main waits for side",
        "d in main",
        "e in main",
    ]


def test_the_whitening_runs_beside_the_scoring_of_attention():
    """In every part of an eviction, and nothing in between touches what it writes."""
    parameters = replace(PARAMETERS, protect_by="distinctness")
    eviction = PagedEviction(**arguments() | dict(parameters=parameters))
    of_a_head = HeadScratch.of(parameters, group_size=2, head_size=64).num_bytes(48, num_splits=1)
    scratch = torch.empty(of_a_head, dtype=torch.uint8)
    whole, parts = (
        list(replace(eviction, scratch=memory).launches(H200)) for memory in (None, scratch)
    )
    kernels = [window_whitening, row_statistics, candidate_scores, token_distinctness]
    assert [one.kernel for one in whole] == [*kernels, select_and_move]
    assert len(parts) > len(whole)
    for number, one in enumerate(parts):
        assert one.is_beside == (one.kernel is window_whitening)
        assert one.needs_beside == (one.kernel is token_distinctness)
        if one.is_beside:
            written = {one.arguments[name].data_ptr() for name in ("key_means", "bases", "floors")}
            for between in parts[number + 1 : number + 3]:
                tensors = [x for x in between.arguments.values() if isinstance(x, torch.Tensor)]
                assert not written & {tensor.data_ptr() for tensor in tensors}


def test_nothing_due_is_nothing_launched():
    PagedEviction(**(arguments() | dict(rows=torch.zeros(0, dtype=torch.int32)))).run()
