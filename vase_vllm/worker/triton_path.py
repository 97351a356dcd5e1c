"""One step's evictions and remapping in Triton, in front of any backend with plain pages.

Nothing here waits for the device. The host finds the due sequences from the scheduler's messages
and the step's lengths; the kernels check this against the block table. All tensors that a CUDA
graph may refer to are persistent: the buffers of the path, and vLLM's.
"""

from collections.abc import Collection

import numpy as np
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.kernels.evict import PagedEviction
from vase_vllm.kernels.launch import scratch_size
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.kernels.remap import BatchRemap
from vase_vllm.kernels.ring import TritonRingWrite
from vase_vllm.kernels.scratch import HeadScratch
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.block_table_row import BlockTableRow, RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.worker.evictor import TorchEvictor
from vase_vllm.worker.nan_warnings import NOT_NAN
from vase_vllm.worker.pages import PlainPages
from vase_vllm.worker.step import PreparedStep, StepContext


class TritonPath:
    """Evicts on pages ``[blocks, heads, block_size, K | V]``.

    The fused kernel evicts if it can compute the policy's ranking; otherwise plain torch does,
    sequence by sequence.
    """

    def __init__(self, context: StepContext, spec: EvictionSpec, layers: dict[int, Attention]):
        self.context = context
        self.spec = spec
        self.layers = layers
        layer = next(iter(layers.values()))
        self.group_size = layer.num_heads // layer.num_kv_heads
        self.softmax_scale = layer.impl.scale
        self.first_kv_head = int(context.kv_heads(spec.num_kv_heads)[0])
        max_num_seqs = context.vllm_config.scheduler_config.max_num_seqs
        device = context.device
        self._starts = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._num_cached = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._layer_indices = torch.tensor(list(layers), dtype=torch.int32, device=device)
        self._token_table: torch.Tensor | None = None
        self._pointers: tuple[int, torch.Tensor] | None = None
        self.page_layout = PlainPages()
        self._evictor = TorchEvictor(
            context.config,
            spec,
            RingLayout(context.config.window, self.group_size, spec.block_size),
            self.page_layout,
            self.softmax_scale,
            context.kv_heads(spec.num_kv_heads),
        )

    @property
    def _is_fused(self) -> bool:
        """Whether the fused kernel evicts; else plain torch does."""
        return self.context.config.fused is not None and self.context.observer is None

    def prepare(self, common: CommonAttentionMetadata, capturing: bool) -> PreparedStep:
        """See :class:`StepPath`."""
        self._evictor.nan_warnings.poll()
        num_rows = common.num_reqs
        rows = common.block_table_tensor[:num_rows]
        if self._pointers is None and self._is_fused and num_rows:
            # Compile the eviction in the first step, which is a dummy one (``warm_up.py``), and not
            # in the middle of serving. It starts at position 0: nothing is due, and the launch
            # leaves all alone.
            num_slots = (rows.shape[1] - BlockTableRow.NUM_HEADER) * self.spec.block_size
            num_cached = min(self.spec.schedule.bound, num_slots)
            nothing = np.zeros(1, dtype=np.int64)
            limits = [self.context.config.limits]
            self._launch(rows, nothing, nothing, nothing, limits, num_cached)
        query_start_loc = common.query_start_loc[: num_rows + 1]
        seq_lens = common.seq_lens[:num_rows]
        token_table = self._token_rows(rows)
        BatchRemap(
            query_start_loc,
            seq_lens,
            rows,
            common.slot_mapping,
            self._starts[:num_rows],
            self._num_cached[:num_rows],
            token_table,
            window=self.spec.schedule.window,
            block_size=self.spec.block_size,
        ).run()
        num_cached = self._evict(common, rows)
        # A graph must be right for the longest sequence that any replay will see.
        max_seq_len = common.max_seq_len if capturing else int(num_cached.max(initial=0))
        return PreparedStep(
            seq_lens=self._num_cached[:num_rows],
            seq_lens_cpu=torch.from_numpy(num_cached.astype(np.int32)),
            max_seq_len=max_seq_len,
            block_table=token_table,
            ring_write=TritonRingWrite(
                positions=common.positions[: common.num_actual_tokens],
                query_start_loc=query_start_loc,
                seq_lens=seq_lens,
                block_table=rows,
                window=self.spec.schedule.window,
            ),
        )

    def _token_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the persistent block table that attention gets, made at the first step.

        Args:
            rows: [R, columns] int32, the step's rows of vLLM's.

        Returns:
            [R, token columns or more] int32, contiguous, each row aligned to 128 bytes.
        """
        if self._token_table is None:
            num_columns = cdiv(rows.shape[1] - BlockTableRow.NUM_HEADER, 32) * 32
            shape = (len(self._starts), num_columns)
            self._token_table = torch.zeros(shape, dtype=torch.int32, device=rows.device)
        return self._token_table[: len(rows)]

    def _evict(self, common: CommonAttentionMetadata, rows: torch.Tensor) -> np.ndarray:
        """Launch the evictions that are due.

        Returns:
            [R] int64 on the host: tokens that each sequence has cached after the step.
        """
        schedule = self.spec.schedule
        assert common.seq_lens_cpu_upper_bound is not None
        # Exact without speculative decoding, under async scheduling too.
        seq_lens = common.seq_lens_cpu_upper_bound[: len(rows)].numpy().astype(np.int64)
        query_lens = np.diff(common.query_start_loc_cpu[: len(rows) + 1].numpy())
        starts = seq_lens - query_lens
        headers = self.context.row_headers.of_rows(common)
        first, budget = headers[:, BlockTableRow.FIRST], headers[:, BlockTableRow.BUDGET]
        due = schedule.due(starts, first)
        due_rows = np.flatnonzero(due & (query_lens > 0))
        if len(due_rows):
            before = np.where(starts == first, first, budget + schedule.window)[due_rows]
            if self._is_fused:
                limits = [
                    self.context.config.limits_of(*numbers)
                    for numbers in headers[due_rows, BlockTableRow.BUDGET :].tolist()
                ]
                num_cached = int(before.max())
                self._launch(rows, due_rows, starts[due_rows], first[due_rows], limits, num_cached)
            else:
                kv_caches = {index: layer.kv_cache for index, layer in self.layers.items()}
                for row, position in zip(due_rows.tolist(), starts[due_rows].tolist(), strict=True):
                    header = RowHeader(*headers[row].tolist())
                    self._evictor.evict(
                        kv_caches, rows[row], header, position, self.context.observer
                    )
            for num_tokens in before - budget[due_rows]:
                self.context.counters.add(len(self.layers), int(num_tokens))
        num_cached = schedule.slots(seq_lens - 1, first, budget) + 1
        self.context.counters.num_cached = num_cached
        return num_cached

    def _launch(
        self,
        rows: torch.Tensor,
        due_rows: np.ndarray,
        starts: np.ndarray,
        first: np.ndarray,
        limits: list[EvictionLimits],
        max_num_cached: int,
    ) -> None:
        """Launch one fused eviction.

        Args:
            rows: [R, columns] int32, the block table.
            due_rows: [due] int64, the rows that evict.
            starts: [due] int64, position of each one's next token.
            first: [due] int64, position of each one's first eviction.
            limits: [due], of each one.
            max_num_cached: of the due rows.
        """
        config = self.context.config
        parameters = config.fused
        assert parameters is not None
        slot_priority = config.policy.slot_priority(
            limits,
            first,
            (starts - first) // parameters.window,
            max_num_cached - parameters.window,
        )
        kv_caches = [layer.kv_cache for layer in self.layers.values()]
        due = self._to_device(due_rows.astype(np.int32))
        nan_keys = torch.full_like(due, NOT_NAN)
        PagedEviction(
            self._kv_pointers(kv_caches),
            kv_caches[0],
            self._layer_indices,
            rows,
            due,
            self._starts[: len(rows)],
            parameters,
            group_size=self.group_size,
            softmax_scale=self.softmax_scale,
            max_num_cached=max_num_cached,
            first_kv_head=self.first_kv_head,
            counts=self._to_device(self._counts(limits)),
            scratch=self.context.scratch,
            slot_priority=None if slot_priority is None else self._to_device(slot_priority),
            nan_keys=nan_keys,
        ).run()
        self._evictor.nan_warnings.watch(nan_keys, first)

    def _counts(self, limits: list[EvictionLimits]) -> np.ndarray:
        """What the fused kernel must know of each sequence: [due, 3] int32."""
        of_rows = [self.context.config.policy.fused(of_row) for of_row in limits]
        counts = [parameters.counts for parameters in of_rows if parameters is not None]
        return np.array(counts, dtype=np.int32)

    def _to_device(self, numbers: np.ndarray) -> torch.Tensor:
        """Copy an array to the device without waiting for the copy."""
        tensor = torch.from_numpy(numbers)
        if self.context.device.type == "cuda":
            return tensor.pin_memory().to(self.context.device, non_blocking=True)
        return tensor

    def _kv_pointers(self, kv_caches: list[torch.Tensor]) -> torch.Tensor:
        """[layers] int64, addresses of the layers' caches; they change only if vLLM reallocates."""
        first = kv_caches[0].data_ptr()
        if self._pointers is None or self._pointers[0] != first:
            pointers = [kv_cache.data_ptr() for kv_cache in kv_caches]
            self._pointers = (
                first,
                torch.tensor(pointers, dtype=torch.int64, device=kv_caches[0].device),
            )
        return self._pointers[1]


def scratch_memory(context: StepContext, layers: Collection[Attention]) -> torch.Tensor | None:
    """Memory for the largest eviction of a step to work in, or None if plain torch evicts.

    It is bounded: an eviction that would need more is launched in several parts.

    Args:
        layers: those of this worker that evict in Triton.

    Returns:
        [bytes] uint8.
    """
    parameters = context.config.fused
    if parameters is None:
        return None
    group_size = max(layer.num_heads // layer.num_kv_heads for layer in layers)
    head_size = max(layer.head_size for layer in layers)
    num_bytes = scratch_size(
        context.vllm_config.scheduler_config.max_num_seqs
        * sum(layer.num_kv_heads for layer in layers),
        context.vllm_config.model_config.max_model_len - parameters.window,
        HeadScratch.of(parameters, group_size, head_size),
    )
    return torch.empty(num_bytes, dtype=torch.uint8, device=context.device)
