"""One sequence's eviction over the layers of one metadata builder, in plain torch.

Any policy, any device, any pages: the CPU's only path, and on a GPU that of the policies which the
fused kernel does not know.
"""

from typing import Protocol

import torch

from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.errors import EvictionError
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.kernels.torch_eviction import largest, plan_moves
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.block_table_row import BlockTableRow, RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.draws import Draws
from vase_vllm.worker.nan_warnings import NaNWarnings
from vase_vllm.worker.pages import CandidatePages, PageLayout
from vase_vllm.worker.query_ring import load_queries

_KEYS_TOGETHER = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Numbers in the keys of the layers that are ranked at once, by device: 4 and 128 MiB of fp32."""


class EvictionObserver(Protocol):
    """Looks at evictions while they happen."""

    def observe(self, candidates: Candidates, priority: torch.Tensor, keep: torch.Tensor) -> None:
        """Look at one layer's eviction from one sequence, and change nothing.

        While anybody looks, layers are ranked one by one.

        Args:
            priority: [H, n], the policy's, +inf where a candidate is sure to stay.
            keep: [H, n] bool, which candidates stay.
        """


class TorchEvictor:
    """Evictions straight on the pages of a KV cache."""

    def __init__(
        self,
        config: EvictionConfig,
        spec: EvictionSpec,
        ring: RingLayout,
        page_layout: PageLayout,
        scale: float,
        kv_heads: torch.Tensor,
    ) -> None:
        """Prepare for layers that share one builder, hence all of the following.

        Args:
            scale: what the attention backend multiplies its logits with.
            kv_heads: [H] int64, indices of this rank's KV heads in the whole model.
        """
        self.config = config
        self.policy = config.policy
        self.spec = spec
        self.ring = ring
        self.page_layout = page_layout
        self.scale = scale
        self.kv_heads = kv_heads
        self.nan_warnings = NaNWarnings(self.policy.name)

    def evict(
        self,
        kv_caches: dict[int, torch.Tensor],
        row: torch.Tensor,
        position: int,
        observer: EvictionObserver | None = None,
    ) -> int:
        """Evict from one sequence that is due, in place.

        Args:
            kv_caches: layer index to [num_blocks, H, block_size, 2 * D], packed as it may be.
            row: [columns] int32, the sequence's whole block-table row.
            position: the position that the sequence's next step starts at.
            observer: looks at the eviction of every layer.

        Returns:
            Tokens dropped per KV head.
        """
        header = RowHeader(*row[: BlockTableRow.NUM_HEADER].tolist())
        limits = self.config.limits_of(header.budget, header.kept)
        schedule = self.spec.schedule.with_budget(header.budget)
        num_cached = schedule.num_cached(position, header.first)
        eviction_index = (position - header.first) // limits.window
        block_size = self.spec.block_size
        blocks = row[BlockTableRow.NUM_HEADER :][: cdiv(num_cached, block_size)].long()
        # Layers with fewer query heads than the largest use fewer of the state blocks.
        state_column = BlockTableRow.state_column(header.first, block_size)
        state_blocks = row[state_column:][: self.ring.num_blocks].long()
        num_candidates = num_cached - limits.window
        draws = Draws(
            limits,
            header.key,
            eviction_index,
            num_candidates,
            list(kv_caches),
            self.kv_heads,
            row.device,
        )
        num_together = 1
        if observer is None:
            num_together = self._layers_together(num_candidates, row.device.type)
        indices = list(kv_caches)
        for start in range(0, len(indices), num_together):
            layers = indices[start : start + num_together]
            caches = [kv_caches[layer] for layer in layers]
            queries = [load_queries(self.ring, cache, state_blocks).float() for cache in caches]
            candidates = Candidates(
                num=num_candidates,
                queries=torch.cat(queries),
                tokens=CandidatePages(
                    self.page_layout, caches, blocks, num_candidates, limits.window
                ),
                scale=self.scale,
                limits=limits,
                first=header.first,
                eviction_index=eviction_index,
                draws=draws.of_layers(layers),
                dtype=caches[0].dtype,
            )
            keep = self.survivors(candidates, observer)
            for cache, of_layer in zip(caches, keep.chunk(len(caches)), strict=True):
                self._move(cache, blocks, limits, of_layer)
        return num_cached - limits.budget

    def _layers_together(self, num_candidates: int, device: str) -> int:
        """How many layers are ranked at once.

        An eviction is some dozens of operations, which for few candidates take longer to start
        than to run. For many, the keys of one layer fill a processor's cache; a GPU's memory takes
        more of them.
        """
        num_keys = len(self.kv_heads) * self.spec.head_size * num_candidates
        return max(1, _KEYS_TOGETHER[device] // num_keys)

    def survivors(
        self, candidates: Candidates, observer: EvictionObserver | None = None
    ) -> torch.Tensor:
        """Which candidates stay: [H, n] bool with ``budget - window`` true per head."""
        limits = candidates.limits
        priority = self.policy.priority(candidates)
        if priority.shape != (len(candidates.queries), candidates.num):
            raise EvictionError(
                f"--kv-eviction {self.policy.name}: priority must have the shape "
                f"{(len(candidates.queries), candidates.num)}, got {tuple(priority.shape)}"
            )
        if priority.isnan().any():
            self.nan_warnings.warn(candidates.draws.eviction.key, candidates.first)
        priority[:, : limits.fixed] = torch.inf
        keep = largest(priority, limits.budget - limits.window)
        if observer is not None:
            observer.observe(candidates, priority, keep)
        return keep

    def _move(
        self,
        kv_cache: torch.Tensor,
        blocks: torch.Tensor,
        limits: EvictionLimits,
        keep: torch.Tensor,
    ) -> None:
        """Move the survivors above the budget into freed slots.

        Args:
            blocks: [n] int64, the blocks of the sequence's slots.
            keep: [H, candidates] bool.
        """
        head, source, destination = plan_moves(limits.budget, limits.window, keep)
        block_size = self.spec.block_size
        self.page_layout.copy(
            kv_cache,
            head,
            (blocks[source // block_size], source % block_size),
            (blocks[destination // block_size], destination % block_size),
        )
