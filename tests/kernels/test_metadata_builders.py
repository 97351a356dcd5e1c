"""vLLM's own metadata builders, over our tensors: what every attention kernel is handed.

Both model runners' code that builds a step's metadata is vLLM's, and so are the builders and the
implementations that call the kernels (``gpu_stand_ins.py`` says what is not). A CUDA graph keeps
the tensors of its capture, so a replay is right if these very tensors hold the next step.
"""

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.gpu_stand_ins import TARGETS, Kernels, Pages, Tables, use
from tests.support.compilation_keys import CompilationKeys
from vase_vllm.kernels.launch import Launch
from vase_vllm.layout.block_table_row import BlockTableRow, RowHeader

BLOCK_SIZE, BUDGET, WINDOW, MAX_MODEL_LEN, MAX_NUM_SEQS = 16, 24, 8, 128, 4
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 64
PAD_SLOT = -1


@dataclass(frozen=True)
class Row:
    """A request's part of a step.

    Attributes:
        name: of the request.
        before: tokens that were computed before the step.
        count: tokens of the step.
        cached: tokens that attention must see after it.
    """

    name: str
    before: int
    count: int
    cached: int


FIRST = {"old": 32, "young": 48, "due": 32}
"""Position of each request's first eviction."""

DECODES = (
    # 34 is the third position after the eviction at 32, so that 24 + 3 tokens are cached. At 40
    # the second eviction is due: 24 tokens, and the new one.
    (Row("old", 34, 1, 27), Row("young", 20, 1, 21), Row("due", 40, 1, 25)),
    (Row("old", 35, 1, 28), Row("young", 21, 1, 22), Row("due", 41, 1, 26)),
    # A request has left, and another has moved into its row.
    (Row("due", 42, 1, 27), Row("young", 22, 1, 23)),
)
MIXED = (Row("old", 36, 1, 29), Row("due", 43, 1, 28), Row("young", 23, 20, 43))


@dataclass
class Worker:
    """A worker's layers, builders and persistent buffers, as vLLM would make them.

    Attributes:
        runner: ``v1`` or ``v2``: whose code builds the metadata.
        kernels: records the kernels' calls.
        config: vLLM's.
        context: ours.
        groups: vLLM's attention groups, of each KV cache group.
        kv_cache_config: vLLM's.
    """

    runner: str
    kernels: Kernels
    config: Any
    context: Any
    groups: list[list[Any]]
    kv_cache_config: Any
    by_index: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        size, num_tokens = MAX_NUM_SEQS, 64
        self.block_tables = [
            torch.zeros(size, group.kv_cache_spec.max_num_blocks_per_req(self.config, 128)).int()
            for group in self.kv_cache_config.kv_cache_groups
        ]
        self.slot_mappings = [
            torch.full((num_tokens,), PAD_SLOT) for _ in self.kv_cache_config.kv_cache_groups
        ]
        self.query_start_loc = torch.zeros(size + 1, dtype=torch.int32)
        self.query_start_loc_cpu = torch.zeros(size + 1, dtype=torch.int32)
        self.seq_lens = torch.zeros(size, dtype=torch.int32)
        self.seq_lens_cpu = torch.zeros(size, dtype=torch.int32)
        self.positions = torch.zeros(num_tokens, dtype=torch.int64)

    def evicts(self, group: int) -> bool:
        """Whether the layers of a KV cache group evict."""
        spec = self.kv_cache_config.kv_cache_groups[group].kv_cache_spec
        return hasattr(spec, "schedule")

    def row_of(self, name: str, group: int) -> list[int]:
        """The block-table row of a request: each has blocks of its own, in each group."""
        number = group * len(FIRST) + list(FIRST).index(name)
        blocks = list(range(1 + 10 * number, 10 + 10 * number))
        if not self.evicts(group):
            return blocks[:8]
        return [*RowHeader(FIRST[name], number, BUDGET, 0), *blocks]

    def admit(self) -> None:
        """What the scheduler's message says of the requests, before their first step."""
        requests = [
            SimpleNamespace(
                req_id=name,
                block_ids=tuple(self.row_of(name, g) for g in range(len(self.block_tables))),
            )
            for name in FIRST
        ]
        message = SimpleNamespace(scheduled_new_reqs=requests, finished_req_ids=set())
        evicting = next(g for g in range(len(self.block_tables)) if self.evicts(g))
        self.context.row_headers.observe(message, evicting)

    def step(self, rows: tuple[Row, ...], num_rows: int | None = None, capturing: bool = False):
        """Build a step's metadata, padded to ``num_rows`` rows of one token: layer to metadata."""
        num_rows = num_rows or len(rows)
        counts = [row.count for row in rows] + [0] * (num_rows - len(rows))
        num_tokens = sum(counts)
        num_padded = max(num_tokens, num_rows)
        if capturing:
            # vLLM's dummy rows: a token each, and a block table of null blocks.
            counts, num_tokens = [1] * num_rows, num_rows
        ends = torch.tensor([0, *counts]).cumsum(0)
        for starts in (self.query_start_loc, self.query_start_loc_cpu):
            starts[: num_rows + 1] = ends
            starts[num_rows + 1 :] = ends[-1]
        for lengths in (self.seq_lens, self.seq_lens_cpu):
            lengths.zero_()
            lengths[: len(rows)] = torch.tensor([row.before + row.count for row in rows])
            if capturing:
                lengths[:num_rows] = 1
        self.positions.zero_()
        for row, begin in zip(rows, ends.tolist(), strict=False):
            self.positions[begin : begin + row.count] = row.before + torch.arange(row.count)
        for group, (table, mapping) in enumerate(
            zip(self.block_tables, self.slot_mappings, strict=True)
        ):
            table.zero_()
            for index, row in enumerate(rows):
                entries = torch.tensor(self.row_of(row.name, group))
                table[index, : len(entries)] = entries
            mapping.fill_(PAD_SLOT)
        self.runner_state.input_batch.req_ids = [row.name for row in rows]
        num_real = num_rows if capturing else len(rows)
        max_query_len = max(counts)
        if self.runner == "v1":
            return self._build_v1(
                num_tokens, num_real, max_query_len, num_padded, num_rows, capturing
            )
        return self._build_v2(rows, max_query_len, num_padded, num_rows, capturing)

    @property
    def runner_state(self) -> Any:
        return self.context.row_headers._runner

    def _build_v1(self, num_tokens, num_real, max_query_len, num_padded, num_rows, capturing):
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        tables = [
            SimpleNamespace(get_device_tensor=lambda size, table=table: table[:size])
            for table in self.block_tables
        ]
        zeros = torch.zeros(MAX_NUM_SEQS, dtype=torch.int32)
        runner = SimpleNamespace(
            kv_cache_config=self.kv_cache_config,
            attn_groups=self.groups,
            model_config=self.config.model_config,
            cache_config=self.config.cache_config,
            speculative_config=None,
            max_model_len=MAX_MODEL_LEN,
            dcp_world_size=1,
            is_mm_prefix_lm=False,
            device=torch.device("cpu"),
            input_batch=SimpleNamespace(
                block_table=tables,
                num_computed_tokens_cpu_tensor=zeros,
                num_prompt_tokens_cpu_tensor=zeros,
            ),
            query_start_loc=SimpleNamespace(gpu=self.query_start_loc, cpu=self.query_start_loc_cpu),
            seq_lens=self.seq_lens,
            optimistic_seq_lens_cpu=self.seq_lens_cpu,
            positions=self.positions,
            _get_encoder_seq_lens=lambda *_, **__: (None, None),
        )
        mappings = {g: mapping[:num_padded] for g, mapping in enumerate(self.slot_mappings)}
        metadata, _ = GPUModelRunner._build_attention_metadata(
            runner,
            num_tokens=num_tokens,
            num_reqs=num_real,
            max_query_len=max_query_len,
            num_tokens_padded=num_padded,
            num_reqs_padded=num_rows,
            for_cudagraph_capture=capturing,
            slot_mappings=mappings,
        )
        return metadata

    def _build_v2(self, rows, max_query_len, num_padded, num_rows, capturing):
        from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

        longest = MAX_MODEL_LEN if capturing else int(self.seq_lens_cpu.max())
        indices = [list(FIRST).index(row.name) for row in rows]
        return build_attn_metadata(
            attn_groups=self.groups,
            num_reqs=num_rows,
            num_tokens=num_padded,
            query_start_loc_gpu=self.query_start_loc[: num_rows + 1],
            query_start_loc_cpu=self.query_start_loc_cpu[: num_rows + 1],
            max_query_len=max_query_len,
            seq_lens=self.seq_lens,
            max_seq_len=longest,
            block_tables=[table[:num_rows] for table in self.block_tables],
            slot_mappings=[mapping[:num_padded] for mapping in self.slot_mappings],
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=self.seq_lens_cpu,
            positions=self.positions[:num_padded],
            for_cudagraph_capture=capturing,
            req_idx=np.array(indices, dtype=np.intp),
        )

    def attend(self, metadata: dict[str, Any], num_tokens: int) -> dict[str, list[Tables | Pages]]:
        """Run vLLM's forward pass of every layer: layer to the calls of its kernels."""
        calls = {}
        for name, layer in self.config.compilation_config.static_forward_context.items():
            self.kernels.calls = []
            query, output = torch.zeros(2, num_tokens, NUM_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
            key, value = torch.zeros(2, num_tokens, NUM_KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
            layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata[name], output)
            calls[name] = self.kernels.calls
        return calls

    def expected(self, rows: tuple[Row, ...], group: int, num_rows: int) -> list[Any]:
        """Blocks and length of each row of a KV cache group that evicts."""
        front = BlockTableRow.NUM_HEADER
        padding = [([], 0)] * (num_rows - len(rows))
        return [
            (
                self.row_of(row.name, group)[front:][: -(-row.cached // BLOCK_SIZE)],
                row.cached,
            )
            for row in rows
        ] + padding


@pytest.fixture(scope="module", autouse=True)
def _triton_in_vllm():
    """vLLM turns Triton off where no backend has an active driver; the interpreter needs none."""
    if "vllm" in sys.modules:
        pytest.skip("vLLM must be imported under the interpreter: run this file alone")
    stand_in = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    triton.backends.backends["cpu"] = stand_in
    yield
    del triton.backends.backends["cpu"]


@pytest.fixture
def make_worker(models, monkeypatch):
    """Makes a worker of a backend, with two layers that evict and as many others as asked."""

    def make(target: str, runner: str, num_sliding: int = 0, policy: str = "random") -> Worker:
        from vllm.config import CUDAGraphMode, set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.layers.attention import Attention
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
        from vllm.v1.worker.gpu.attn_utils import (
            get_kv_cache_spec,
            init_attn_backend,
            init_kv_cache,
        )

        from vase_vllm.config import EvictionConfig
        from vase_vllm.worker import step
        from vase_vllm.worker.backend import wrap_layers
        from vase_vllm.worker.counters import EvictionCounters
        from vase_vllm.worker.row_headers import RowHeaders

        arguments = EngineArgs(
            str(models.qwen3(vocab_size=1024)),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_MODEL_LEN,
            additional_config={
                "kv_eviction": {"policy": policy, "budget": BUDGET, "window": WINDOW}
            },
        )
        config = arguments.create_engine_config()
        config.cache_config.block_size = BLOCK_SIZE
        config.cache_config.kv_cache_layout = TARGETS[target].layout
        compilation = config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        compilation.cudagraph_capture_sizes = [1, 2, 4]
        compilation.max_cudagraph_capture_size = 4
        monkeypatch.setattr(step, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(step, "get_tensor_model_parallel_world_size", lambda: 1)
        with set_current_vllm_config(config):
            backend, kernels = use(TARGETS[target], monkeypatch)
            for index in range(2 + num_sliding):
                Attention(
                    NUM_HEADS,
                    HEAD_SIZE,
                    HEAD_SIZE**-0.5,
                    NUM_KV_HEADS,
                    cache_config=config.cache_config,
                    per_layer_sliding_window=32 if index >= 2 else None,
                    prefix=f"model.layers.{index}.self_attn.attn",
                    attn_backend=backend,
                )
            eviction = EvictionConfig.from_vllm(config)
            of_runner = SimpleNamespace(
                input_batch=SimpleNamespace(req_ids=[]),
                req_states=SimpleNamespace(
                    req_id_to_index={name: index for index, name in enumerate(FIRST)}
                ),
            )
            context = step.StepContext(
                config=eviction,
                vllm_config=config,
                device=torch.device("cpu"),
                counters=EvictionCounters(num_layers=2),
                row_headers=RowHeaders(of_runner, MAX_NUM_SEQS),
            )
            wrap_layers(context)
            specs = get_kv_cache_spec(config)
            (kv_cache_config,) = get_kv_cache_configs(config, [specs], [16 << 20])
            device = torch.device("cpu")
            groups, _, block_sizes = init_attn_backend(kv_cache_config, config, device)
            layers = compilation.static_forward_context
            init_kv_cache(layers, kv_cache_config, device, block_sizes, config)
        worker = Worker(runner, kernels, config, context, groups, kv_cache_config)
        with set_current_vllm_config(config):
            worker.admit()
        return worker

    return make


def check_call(call: Tables | Pages, longest: int) -> None:
    """What the kernels need of their tensors, whatever these hold."""
    from vllm.utils.torch_utils import is_strictly_contiguous

    for tensor in call.tensors:
        assert tensor.dtype == torch.int32
        assert is_strictly_contiguous(tensor)
    if isinstance(call, Tables):
        table = call.block_table
        # XQA and trtllm-gen take the pitch of the rows from the width; they, and a batch's later
        # part, read rows in vectors.
        assert table.stride() == (table.shape[1], 1)
        assert table.stride(0) * table.element_size() % 128 == 0
        assert table.storage_offset() * table.element_size() % 128 == 0
        assert len(table) == len(call.seq_lens)
        assert table.shape[1] * BLOCK_SIZE >= call.max_seq_len >= longest


def sequences(calls: list[Tables | Pages]) -> list[Any]:
    """What all of a layer's kernels read. The kernel for the decodes, the first rows, runs last."""
    return [row for call in reversed(calls) for row in call.sequences(BLOCK_SIZE)]


of_targets = pytest.mark.parametrize("target", TARGETS)
of_runners = pytest.mark.parametrize("runner", ["v1", "v2"])


@of_runners
@of_targets
def test_a_step_without_a_graph(make_worker, target, runner):
    worker = make_worker(target, runner)
    for rows in (*DECODES, MIXED):
        num_tokens = sum(row.count for row in rows)
        calls = worker.attend(worker.step(rows), num_tokens)
        expected = worker.expected(rows, 0, len(rows))
        for of_layer in calls.values():
            assert sequences(of_layer) == expected
            for call in of_layer:
                check_call(call, max(length for _, length in call.sequences(BLOCK_SIZE)))
    assert worker.context.counters.as_dict()["evictions"] > 0


@of_runners
@of_targets
def test_a_replayed_graph(make_worker, target, runner):
    """A decode graph for four rows, which has one or two rows of padding when it is replayed."""
    worker = make_worker(target, runner)
    captured = worker.attend(worker.step((), num_rows=4, capturing=True), 4)
    addresses = {
        name: [tensor.data_ptr() for call in calls for tensor in call.tensors]
        for name, calls in captured.items()
    }
    for rows in DECODES:
        replayed = worker.attend(worker.step(rows, num_rows=4), 4)
        expected = worker.expected(rows, 0, num_rows=4)
        for name, calls in captured.items():
            assert sequences(calls) == expected
            assert sequences(replayed[name]) == expected
            assert addresses[name] == [
                tensor.data_ptr() for call in replayed[name] for tensor in call.tensors
            ]
            for call in calls:
                check_call(call, max(length for _, length in expected))


@of_runners
def test_flash_attention_3_plans_ahead_with_our_lengths(make_worker, runner):
    """Its plan is made outside of the graph, from the lengths, into a tensor that stays."""
    worker = make_worker("flash-attention 3", runner)
    captured = worker.attend(worker.step((), num_rows=4, capturing=True), 4)
    for rows in DECODES:
        worker.step(rows, num_rows=4)
        lengths = [length for _, length in worker.expected(rows, 0, num_rows=4)]
        for (call,) in captured.values():
            assert call.scheduler_metadata.tolist() == [0, *lengths, *[0] * 12]


@of_runners
@of_targets
def test_every_group_of_a_hybrid_evicts(make_worker, target, runner):
    """Two layers that evict beside one with a sliding window: a KV cache group each."""
    worker = make_worker(target, runner, num_sliding=1)
    groups = worker.kv_cache_config.kv_cache_groups
    assert len(groups) == 3
    for rows in DECODES[:2]:
        calls = worker.attend(worker.step(rows), num_tokens=len(rows))
        for index, group in enumerate(groups):
            (name,) = group.layer_names
            if worker.evicts(index):
                assert sequences(calls[name]) == worker.expected(rows, index, len(rows))
            else:
                lengths = [length for _, length in sequences(calls[name])]
                assert lengths == [row.before + row.count for row in rows]


def test_evictions_work_in_memory_that_was_taken_with_the_layers(make_worker, monkeypatch):
    """Before vLLM measures what is left for the KV cache, so that it is not taken from that."""
    from vase_vllm.worker import triton_path

    worker = make_worker("triton", "v2")
    scratch, evictions, original = worker.context.scratch, [], triton_path.PagedEviction

    def recorded(*arguments, **options):
        evictions.append(original(*arguments, **options))
        return evictions[-1]

    monkeypatch.setattr(triton_path, "PagedEviction", recorded)
    worker.step(DECODES[0])
    assert scratch.dtype == torch.uint8
    assert len(evictions) == 2, "the first step compiles, and one row is due"
    assert all(eviction.scratch is scratch for eviction in evictions)


@st.composite
def any_rows(draw: st.DrawFn) -> tuple[Row, ...]:
    """A step's prefills, decodes and evictions, which are due every 8 tokens."""
    names = draw(st.lists(st.sampled_from(list(FIRST)), min_size=1, unique=True))
    before = st.one_of(st.integers(0, 15).map(lambda n: FIRST["old"] + 8 * n), st.integers(0, 100))
    count = st.one_of(st.just(1), st.integers(1, 20))
    return tuple(Row(name, min(draw(before), 100), draw(count), 0) for name in names)


@of_runners
def test_the_first_step_compiles_for_all_others(make_worker, monkeypatch, runner):
    """With vLLM's own tensors. Nothing runs: what Triton would compile depends on nothing else."""
    worker = make_worker("flash-attention 3", runner, policy="vase")
    key, launched = CompilationKeys(), set()
    monkeypatch.setattr(Launch, "run", lambda launch: launched.add(key(launch)))
    worker.attend(worker.step((), num_rows=1, capturing=True), num_tokens=1)
    compiled = set(launched)
    assert sorted(name for name, _ in compiled) == [
        *("candidate_scores", "remap_sequences", "row_statistics", "select_and_move", "store_ring")
    ]

    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(any_rows(), st.booleans())
    def take_step(rows: tuple[Row, ...], is_padded: bool) -> None:
        num_tokens = sum(row.count for row in rows)
        in_a_graph = is_padded and num_tokens == len(rows)
        metadata = worker.step(rows, num_rows=4 if in_a_graph else None)
        worker.attend(metadata, 4 if in_a_graph else num_tokens)

    take_step()
    assert launched == compiled
    assert worker.context.counters.as_dict()["evictions"] > 0
