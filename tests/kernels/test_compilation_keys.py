"""Triton compiles nothing after the first step: no argument that varies is one it specialises on.

The keys under which Triton caches what it compiles are computed for drawn models, and for steps of
any number of sequences, lengths, budgets, splits and parts, with the addresses of real tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.compilation_keys import CompilationKeys
from vase_vllm.kernels import launch, scratch
from vase_vllm.kernels.evict import PagedEviction
from vase_vllm.kernels.launch import DeviceLimits, Launch, scratch_size
from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.kernels.remap import BatchRemap
from vase_vllm.kernels.ring import TritonRingWrite
from vase_vllm.kernels.scratch import HeadScratch
from vase_vllm.layout.block_table_row import BlockTableRow

H200 = DeviceLimits(num_sms=132, shared_memory=227 * 1024, capability=9)
MAX_NUM_SEQS, BLOCK_SIZE = 6, 16
KERNELS = {
    "attention": ("row_statistics", "candidate_scores", "select_and_move"),
    "distinctness": (
        *("row_statistics", "candidate_scores", "window_whitening", "token_distinctness"),
        "select_and_move",
    ),
    "memory": (
        *("row_statistics", "candidate_scores", "window_scores", "remember_attention"),
        *("window_whitening", "token_distinctness", "select_and_move"),
    ),
    "strata": (
        *("row_statistics", "candidate_scores", "window_whitening", "token_distinctness"),
        "select_and_move",
    ),
    "uniform": ("select_and_move",),
    "age": ("select_and_move",),
}
BATCH_KERNELS = ("remap_sequences", "store_ring")


@dataclass(frozen=True)
class Model:
    """A model's attention, its cache and its policy, which is one of ``KERNELS``."""

    num_layers: int = 1
    num_kv_heads: int = 1
    group_size: int = 1
    window: int = 3
    budget: int = 20
    num_token_blocks: int = 20
    policy: str = "attention"
    scratch_bytes: int | None = None

    @property
    def parameters(self) -> EvictionParameters:
        by_distinctness = self.policy in ("distinctness", "memory", "strata")
        return EvictionParameters(
            self.budget,
            self.window,
            2,
            sinks=2,
            smoothing=1,
            scoring=self.policy if self.policy in ("uniform", "age") else "attention",
            sampling="greedy" if self.policy == "age" else "gumbel",
            protect_by="distinctness" if by_distinctness else "value_range",
            memory=0.9 if self.policy == "memory" else 0.0,
            strata=min(3, self.window) if self.policy == "strata" else 1,
        )


@dataclass(frozen=True)
class Step:
    """A step: its rows and tokens, and of the rows those that are due and the longest of them."""

    num_rows: int
    num_tokens: int
    num_due: int
    max_num_cached: int


class Worker:
    """The tensors that a worker keeps, and the launches of its steps."""

    def __init__(self, model: Model) -> None:
        self.model = model
        head_size = 64
        self.kv_cache = torch.zeros(
            2, model.num_kv_heads, BLOCK_SIZE, 2 * head_size, dtype=torch.bfloat16
        )
        columns = BlockTableRow.NUM_HEADER + model.num_token_blocks
        self.block_table = torch.zeros(MAX_NUM_SEQS, columns, dtype=torch.int32)
        self.token_table = torch.zeros(MAX_NUM_SEQS, 32, dtype=torch.int32)
        self.of_rows = torch.zeros(3, 64, dtype=torch.int32)
        self.of_tokens = torch.zeros(2, 64, dtype=torch.int64)
        self.query = torch.zeros(
            64, model.num_kv_heads * model.group_size, head_size, dtype=torch.bfloat16
        )
        self.scratch = torch.zeros(
            model.scratch_bytes
            or scratch_size(
                MAX_NUM_SEQS * model.num_layers * model.num_kv_heads,
                model.num_token_blocks * BLOCK_SIZE - model.window,
                HeadScratch.of(model.parameters, model.group_size, head_size),
            ),
            dtype=torch.uint8,
        )

    def launches(self, step: Step) -> Iterator[Launch]:
        """All launches of a step."""
        model, rows = self.model, self.block_table[: step.num_rows]
        starts, num_cached, seq_lens = (of_rows[: step.num_rows] for of_rows in self.of_rows)
        query_start_loc = torch.zeros(64, dtype=torch.int32)[: step.num_rows + 1]
        positions, slot_mapping = (of_tokens[: step.num_tokens] for of_tokens in self.of_tokens)
        yield BatchRemap(
            query_start_loc,
            seq_lens,
            rows,
            slot_mapping,
            starts,
            num_cached,
            self.token_table[: step.num_rows],
            window=model.window,
            block_size=BLOCK_SIZE,
        ).launch()
        write = TritonRingWrite(positions, query_start_loc, seq_lens, rows, window=model.window)
        yield write.launch(self.kv_cache, self.query[: step.num_tokens])
        yield from self._evictions(step, rows, starts)

    def _evictions(self, step: Step, rows: torch.Tensor, starts: torch.Tensor) -> Iterator[Launch]:
        model = self.model
        num_candidates = step.max_num_cached - model.window
        yield from PagedEviction(
            torch.zeros(model.num_layers, dtype=torch.int64),
            self.kv_cache,
            torch.zeros(model.num_layers, dtype=torch.int32),
            rows,
            torch.zeros(step.num_due, dtype=torch.int32),
            starts,
            model.parameters,
            group_size=model.group_size,
            softmax_scale=0.125,
            max_num_cached=step.max_num_cached,
            counts=torch.zeros(step.num_due, 3, dtype=torch.int32),
            scratch=self.scratch,
            slot_priority=torch.zeros(step.num_due, num_candidates, dtype=torch.int32)
            if model.policy == "age"
            else None,
            nan_keys=torch.zeros(step.num_due, dtype=torch.int32),
        ).launches(H200)

    def warm_up(self) -> Iterator[Launch]:
        """The launches of the first step."""
        bound = self.model.budget + self.model.window
        return self.launches(Step(1, 1, 1, max_num_cached=bound))


MODELS = st.builds(
    Model,
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 4),
    group_size=st.sampled_from([1, 2, 3, 4, 5, 8]),
    window=st.integers(1, 20),
    budget=st.integers(24, 40),
    num_token_blocks=st.integers(8, 40),
    policy=st.sampled_from(list(KERNELS)),
    # A few heads at a time, or all at once.
    scratch_bytes=st.sampled_from([None, 1 << 15]),
)


@st.composite
def models_and_steps(draw: st.DrawFn) -> tuple[Model, list[Step]]:
    model = draw(MODELS)
    steps = []
    for _ in range(draw(st.integers(1, 8))):
        num_rows = draw(st.integers(1, MAX_NUM_SEQS))
        steps.append(
            Step(
                num_rows,
                num_tokens=draw(st.integers(1, 64)),
                num_due=draw(st.integers(1, num_rows)),
                max_num_cached=draw(
                    st.integers(2 * model.window, model.num_token_blocks * BLOCK_SIZE)
                ),
            )
        )
    return model, steps


def new_keys(model: Model, steps: list[Step], **changes: bool) -> set[str]:
    """Kernels that would be compiled after the first step."""
    keys, worker = CompilationKeys(**changes), Worker(model)
    warm = keys.of(worker.warm_up())
    names = sorted([*KERNELS[model.policy], *BATCH_KERNELS])
    assert sorted(name for name, _ in warm) == names, "one of each kernel, and not two"
    return {name for step in steps for name, _ in keys.of(worker.launches(step)) - warm}


@settings(max_examples=200, deadline=None)
@given(models_and_steps())
def test_the_first_step_compiles_for_all_others(model_and_steps):
    assert new_keys(*model_and_steps) == set()


LONG = Step(num_rows=3, num_tokens=9, num_due=3, max_num_cached=310)


def test_numbers_that_vary_would_compile_again_if_they_were_specialised():
    """So the test above can fail: of a small eviction there is 1 split and 1 part, of this more."""
    changed = new_keys(Model(scratch_bytes=1 << 12), [LONG], specialise_all=True)
    assert changed == {"row_statistics", "candidate_scores", "select_and_move", "store_ring"}


def test_scratch_memory_that_is_not_padded_would_compile_again(monkeypatch):
    """With three query rows of one head: four sequences are aligned where one is not."""
    four = Step(num_rows=4, num_tokens=4, num_due=4, max_num_cached=23)
    assert new_keys(Model(), [four]) == set()
    for module in (scratch, launch):
        monkeypatch.setattr(module, "padded_words", lambda num_words: num_words)
    assert new_keys(Model(), [four]) == {"row_statistics", "candidate_scores"}
