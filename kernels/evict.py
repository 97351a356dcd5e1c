"""Eviction of KV-cache tokens in place, straight on the paged cache.

Per due sequence, layer and KV head (G query heads, head size D, W window queries, n candidates):

    a[j] = mean over g, w of softmax_j(q[g, w] . k[j] * scale)      then average pooling over slots
    r[j] = max_d v[j] - min_d v[j]
    protected = the P largest r (the sinks first); of the rest the largest log a + Gumbel noise stay
    survivors above the budget T are copied into the freed slots below it

Three kernels cover all sequences, layers and heads:

1. ``row_statistics``: maximum and sum of exponentials of every query row, over a split of the
   candidates. The mean of softmaxes needs them before it can weigh a single key.
2. ``candidate_scores``: merges the splits' statistics, recomputes the logits and writes a and r:
   8 bytes of scratch per candidate. It is launched once per tile of query rows (256 on an H200).
3. ``select_and_move``: one program per head; thresholds found bit by bit, without a sort.

That is scoring by attention. The two other kinds (``EvictionParameters.scoring``) read no K, V or
queries and need the third kernel alone: ``uniform`` gives every candidate a score of 1, so that
Gumbel noise draws uniformly; ``age`` ranks by numbers that the caller passes. Both protect the
sinks alone, by their slots: a sink never moves, for survivors below the budget stay where they are.

Another number than r may protect (``EvictionParameters.protect_by``): the distinctness takes two
more kernels, which ``distinctness.py`` describes. ``EvictionParameters.memory`` ranks by attention
that tokens have received from earlier windows as well: two more, in ``remembering.py``. With
``EvictionParameters.strata`` the third kernel selects from each part of the text (``strata.py``).

What a head costs is counted in ``scoring.py``, ``search.py`` and ``selection.py``, how heads become
programs in ``launch.py``, what they take on a GPU by ``benchmarks/kernels/eviction.py``.
"""

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl

from vase_vllm.kernels.checks import (
    check_block_table,
    check_cache,
    check_ring,
    check_slot_priority,
    check_tensor,
)
from vase_vllm.kernels.distinctness import token_launches
from vase_vllm.kernels.launch import (
    DeviceLimits,
    Launch,
    LaunchPlan,
    ScoringTile,
    device_limits,
    plan_launch,
    run_launches,
    scoring_tile,
    value_tile,
)
from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.kernels.remembering import remember_launches
from vase_vllm.kernels.scoring import MAX_SPLITS, candidate_scores, row_statistics
from vase_vllm.kernels.scratch import SCRATCH_BYTES, HeadScratch, some
from vase_vllm.kernels.selection import select_and_move
from vase_vllm.kernels.whitening import whitening_launch
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.block_table_row import BlockTableRow

TRITON_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
SELECT_TILE = 1024
SEARCH_TILE = 4096
"""The most candidates that a program searches in its registers: 32 per thread."""
MOVE_BYTES = 32 * 1024
"""Bytes of the cells that a program copies at once: 256 per thread."""


@dataclass(frozen=True, eq=False)
class PagedEviction:
    """An eviction from the due sequences among ``rows``, in all layers, in place.

    A row that is not due by its own header (``first`` of 0, or the position not a whole number of
    windows after ``first``) is left alone, so the caller may pass more rows than are due.

    Here a sequence of 8 tokens evicts for the first time, by age, and keeps 4: the sink, the newest
    candidate and the window of 2. Survivors at or above slot 4 move into the freed slots below it:

    >>> cache = torch.zeros(2, 1, 16, 128)  # 2 blocks, 1 KV head, 16 slots, K and V of 64 elements
    >>> cache[1, 0, :8, 0] = torch.arange(8.0)  # block 1; every key begins with its position
    >>> first, key, budget, kept = 8, 0, 4, 0
    >>> PagedEviction(
    ...     kv_pointers=torch.tensor([cache.data_ptr()]),
    ...     kv_cache=cache,
    ...     layer_indices=torch.tensor([0], dtype=torch.int32),
    ...     block_table=torch.tensor([[first, key, budget, kept, 1]], dtype=torch.int32),
    ...     rows=torch.tensor([0], dtype=torch.int32),
    ...     positions=torch.tensor([8]),
    ...     parameters=EvictionParameters(
    ...         budget=4, window=2, protected=1, sinks=1, sampling="greedy", scoring="age"
    ...     ),
    ...     group_size=1,
    ...     softmax_scale=64**-0.5,
    ...     max_num_cached=8,
    ...     slot_priority=torch.arange(6, dtype=torch.int32)[None],
    ... ).run()
    >>> cache[1, 0, :4, 0]
    tensor([0., 5., 6., 7.])

    Attributes:
        kv_pointers: [layers] int64, ``data_ptr()`` of each layer's cache, 16-byte aligned.
        kv_cache: [num_blocks, H, block_size, 2 * D], any one of them: all layers share its
            shape, strides and dtype. Keys are ``[..., :D]``; the last dimension is contiguous.
        layer_indices: [layers] int32, indices in the whole model; they key the draws.
        block_table: [R, columns] int32, rows of a header, token blocks and state blocks.
        rows: [due] int32, rows of ``block_table`` that may be due; no row twice.
        positions: [R] int32 or int64, tokens that each sequence has computed so far.
        parameters: what to keep and how to rank. The state blocks have room for ``num_numbers`` of
            each of its ``budget`` tokens; those of a row's own budget beside its kept prompt must
            not be more.
        counts: [due, 3] int32, each sequence's own ``EvictionParameters.counts``; None: they are
            those of ``parameters`` for all.
        group_size: query heads per KV head (G).
        softmax_scale: of the model's attention; the temperature is divided out here.
        max_num_cached: at least the cached length of every due sequence; a sequence that is
            longer is left alone, because it would overrun the scratch memory.
        first_kv_head: index in the whole model of this rank's first KV head.
        scratch: [bytes] uint8 to work in (:func:`scratch_size`); None allocates up to
            ``SCRATCH_BYTES``. If more heads are due than fit, they are launched one part after the
            other.
        num_splits: programs that share a head's candidates in the scoring of attention; None is
            the best by :func:`plan_launch`.
        slot_priority: [due, n] int32, for scoring by age: the number that ranks each slot, such as
            the position of its token, one row for each of ``rows``; all layers and heads share it.
            n is at least ``max_num_cached - window``.
        nan_keys: [due] int32, written in place: the key of a row that has a priority of NaN, which
            ranks lowest. None: nothing is reported.
    """

    kv_pointers: torch.Tensor
    kv_cache: torch.Tensor
    layer_indices: torch.Tensor
    block_table: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    parameters: EvictionParameters
    _: KW_ONLY
    group_size: int
    softmax_scale: float
    max_num_cached: int
    first_kv_head: int = 0
    counts: torch.Tensor | None = None
    scratch: torch.Tensor | None = None
    num_splits: int | None = None
    slot_priority: torch.Tensor | None = None
    nan_keys: torch.Tensor | None = None

    def run(self) -> None:
        """Launch the eviction, without waiting for it.

        Raises:
            ValueError: see :meth:`check`.
        """
        if not (len(self.rows) and len(self.kv_pointers)):
            return
        self.check()
        device = self.kv_cache.device
        run_launches(self.launches(device_limits(device)), device)

    def check(self) -> None:
        """Check all arguments.

        Raises:
            ValueError: names the argument whose shape, dtype, device or stride is not supported.
        """
        num_layers, num_due, device = len(self.kv_pointers), len(self.rows), self.kv_cache.device
        check_cache(self.kv_cache)
        check_block_table(self.block_table, device)
        num_rows, num_columns = self.block_table.shape
        integers = (torch.int32, torch.int64)
        check_tensor("kv_pointers", self.kv_pointers, (num_layers,), (torch.int64,), device)
        check_tensor("layer_indices", self.layer_indices, (num_layers,), (torch.int32,), device)
        check_tensor("rows", self.rows, (num_due,), (torch.int32,), device)
        check_tensor("positions", self.positions, (num_rows,), integers, device)
        window, block_size = self.parameters.window, self.kv_cache.shape[2]
        if self._scores_attention:
            check_ring(window, self.group_size, block_size)
        scoring = self.parameters.scoring
        check_slot_priority(self.slot_priority, scoring, num_due, self._max_candidates, device)
        if self.counts is not None:
            check_tensor("counts", self.counts, (num_due, 3), (torch.int32,), device)
        if self.nan_keys is not None:
            check_tensor("nan_keys", self.nan_keys, (num_due,), (torch.int32,), device)
        num_token_blocks = num_columns - BlockTableRow.NUM_HEADER
        if self.max_num_cached > num_token_blocks * block_size:
            raise ValueError(
                f"max_num_cached ({self.max_num_cached}) is more than a row of block_table can "
                "address"
            )
        if self.num_splits is not None and not 1 <= self.num_splits <= MAX_SPLITS:
            raise ValueError(f"num_splits must be in [1, {MAX_SPLITS}], got {self.num_splits}")
        if self.scratch is not None:
            check_tensor("scratch", self.scratch, self.scratch.shape[:1], (torch.uint8,), device)

    def launches(self, limits: DeviceLimits) -> Iterator[Launch]:
        """The launches on a device of these limits, in order.

        Scratch memory is allocated here, unless it was given.
        """
        parameters = self.parameters
        tile = scoring_tile(
            self._head.num_rows, self._head_size, self.kv_cache.element_size(), limits
        )
        plan = self._plan(tile, limits)
        num_splits, num_chunks = plan.num_splits, cdiv(self._head.num_rows, tile.queries)
        scratch = self._scratch(plan)
        common = self._common_arguments(plan)
        streaming = dict(num_splits=num_splits, EXACT=self._is_exact)
        scoring = streaming | self._scoring_arguments(tile) | some(scratch, "maxima", "sums")
        results = some(scratch, "scores", "ordered")
        selecting = results | self._selecting_arguments(scratch)
        for offset in range(0, self._num_tasks, plan.tasks_per_launch):
            num = min(plan.tasks_per_launch, self._num_tasks - offset)
            part = dict(task_offset=offset, **common)
            if self._by_distinctness:
                yield whitening_launch(num, part, scratch, parameters.ridge)
            if self._scores_attention:
                yield Launch(row_statistics, num * num_chunks * num_splits, part | scoring)
            for chunk in range(num_chunks):
                of_chunk = dict(
                    chunk=chunk,
                    VALUE_TILE=0 if self._by_distinctness else value_tile(tile.keys, num_chunks),
                    PREFETCH_VALUES=tile.programs_per_sm == 1,
                )
                chunked = part | scoring | results | of_chunk
                yield Launch(candidate_scores, num * num_splits, chunked)
            if parameters.memory:
                yield from remember_launches(num, part, scoring, scratch, parameters)
            if self._by_distinctness:
                yield from token_launches(num * num_splits, part | streaming, scratch, limits)
            yield Launch(select_and_move, num, part | selecting)

    @property
    def _scores_attention(self) -> bool:
        return self.parameters.scoring == "attention"

    @property
    def _by_distinctness(self) -> bool:
        return self.parameters.protect_by == "distinctness"

    @property
    def _is_exact(self) -> bool:
        """Whether products have fp32 operands: the interpreter multiplies bf16 wrongly."""
        return self.kv_cache.dtype == torch.float32 or self.kv_cache.device.type == "cpu"

    @cached_property
    def _head(self) -> HeadScratch:
        return HeadScratch.of(self.parameters, self.group_size, self._head_size)

    @property
    def _group(self) -> dict[str, int]:
        """Arguments of the kernels that have to do with the queries of a head."""
        return dict(GROUP=self.group_size, WINDOW_SCORES=self._head.window_scores)

    @property
    def _head_size(self) -> int:
        return self.kv_cache.shape[3] // 2

    @property
    def _num_tasks(self) -> int:
        """Due sequences * layers * KV heads."""
        return len(self.rows) * len(self.kv_pointers) * self.kv_cache.shape[1]

    @property
    def _max_candidates(self) -> int:
        return self.max_num_cached - self.parameters.window

    def _plan(self, tile: ScoringTile, limits: DeviceLimits) -> LaunchPlan:
        return plan_launch(
            self._num_tasks,
            self._max_candidates,
            self._head,
            SCRATCH_BYTES if self.scratch is None else len(self.scratch),
            tile,
            limits,
            self.num_splits,
        )

    def _scratch(self, plan: LaunchPlan) -> dict[str, torch.Tensor]:
        """The parts of the scratch memory, by the kernels' names for them."""
        memory = self.scratch
        if memory is None:
            memory = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=self.kv_cache.device)
        return self._head.divide(memory, plan.tasks_per_launch, plan.capacity, plan.num_splits)

    def _common_arguments(self, plan: LaunchPlan) -> dict[str, Any]:
        """Arguments of all kernels."""
        counts = self.counts
        if counts is None:
            of_row = torch.tensor(self.parameters.counts, dtype=torch.int32)
            counts = of_row.repeat(len(self.rows), 1).to(self.kv_cache.device)
        return dict(
            kv_pointers=self.kv_pointers,
            block_table=self.block_table,
            rows=self.rows,
            counts=counts,
            positions=self.positions,
            capacity=plan.capacity,
            num_layers=len(self.kv_pointers),
            num_kv_heads=self.kv_cache.shape[1],
            table_stride=self.block_table.stride(0),
            block_stride=self.kv_cache.stride(0),
            head_stride=self.kv_cache.stride(1),
            slot_stride=self.kv_cache.stride(2),
            KV_TYPE=TRITON_TYPES[self.kv_cache.dtype],
            WINDOW=self.parameters.window,
            HEAD_SIZE=self._head_size,
            BLOCK_SIZE=self.kv_cache.shape[2],
        )

    def _scoring_arguments(self, tile: ScoringTile) -> dict[str, Any]:
        """Arguments of the two kernels that score attention."""
        return dict(
            scale=self.softmax_scale / self.parameters.temperature * math.log2(math.e),
            **self._group,
            QUERY_TILE=tile.queries,
            KEY_TILE=tile.keys,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )

    def _selecting_arguments(self, scratch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Arguments of ``select_and_move`` alone."""
        parameters = self.parameters
        padded = triton.next_power_of_2(2 * self._head_size)
        return dict(
            layer_indices=self.layer_indices,
            slot_priority=self.slot_priority,
            nan_keys=self.nan_keys,
            # There where there are strata alone.
            places=scratch.get("places"),
            members=scratch.get("members"),
            num_priorities=0 if self.slot_priority is None else self.slot_priority.shape[1],
            numbers_stride=parameters.budget if parameters.memory else None,
            seed_low=_signed(parameters.seed),
            seed_high=_signed(parameters.seed >> 32),
            first_kv_head=self.first_kv_head,
            SCORING=parameters.scoring,
            **self._group,
            GUMBEL=parameters.sampling == "gumbel",
            SMOOTHING=parameters.smoothing,
            STRATA=parameters.strata,
            SEARCH_TILE=max(
                SELECT_TILE, min(SEARCH_TILE, triton.next_power_of_2(parameters.budget))
            ),
            TILE=SELECT_TILE,
            MOVE_TILE=min(64, MOVE_BYTES // (padded * self.kv_cache.element_size())),
            num_warps=4,
            # Four programs share an SM; three where positions are searched as well.
            maxnreg=128 if parameters.strata == 1 else 168,
        )


def _signed(word: int) -> int:
    """The low 32 bits as an int32, so that the argument has one type whatever the seed."""
    return ((word + 2**31) & 0xFFFFFFFF) - 2**31
