"""One sequence's eviction over the layers of one metadata builder, in plain torch.

Any policy, any device, any pages: the CPU's only path, and on a GPU that of the policies which the
fused kernel does not know.
"""

from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import pad

from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.errors import EvictionError
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.kernels.torch_eviction import largest, plan_moves
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.block_table_row import BlockTableRow, RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.token_state import TokenStateLayout
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.draws import Draws
from vase_vllm.worker.nan_warnings import NOT_NAN, NaNWarnings
from vase_vllm.worker.pages import CandidatePages, PageLayout
from vase_vllm.worker.query_ring import load_queries
from vase_vllm.worker.token_state import load_numbers, store_numbers

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
        header: RowHeader,
        position: int,
        observer: EvictionObserver | None = None,
    ) -> int:
        """Evict from one sequence that is due, in place.

        Args:
            kv_caches: layer index to [num_blocks, H, block_size, 2 * D], packed as it may be.
            row: [columns] int32, the sequence's whole block-table row.
            header: what the row begins with, on the host.
            position: the position that the sequence's next step starts at.
            observer: looks at the eviction of every layer.

        Returns:
            Tokens dropped per KV head.
        """
        limits = self.config.limits_of(header.budget, header.kept)
        schedule = self.spec.schedule.with_budget(header.budget)
        num_cached = schedule.num_cached(position, header.first)
        eviction_index = (position - header.first) // limits.window
        block_size = self.spec.block_size
        blocks = row[BlockTableRow.NUM_HEADER :][: cdiv(num_cached, block_size)].long()
        # Layers with fewer query heads than the largest use fewer of the state blocks.
        state_column = BlockTableRow.state_column(header.first, block_size)
        state_blocks = row[state_column:].long()
        ring_blocks = state_blocks[: self.ring.num_blocks]
        number_blocks = state_blocks[self.ring.num_blocks :]
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
            queries = [load_queries(self.ring, cache, ring_blocks).float() for cache in caches]
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
            numbers = None
            if self.policy.num_numbers and eviction_index:
                numbers = self._load_numbers(caches, number_blocks, limits)
            keep, numbers = self.survivors(candidates, numbers, observer)
            moves = plan_moves(limits.budget, limits.window, keep)
            self._move(caches, blocks, *moves)
            if numbers is not None:
                head, source, destination = moves
                moved = numbers.clone()
                moved[head, :, destination] = numbers[head, :, source]
                left = moved[..., limits.kept : limits.budget]
                self._store_numbers(caches, number_blocks, left)
        self.nan_warnings.poll()
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
        self,
        candidates: Candidates,
        numbers: torch.Tensor | None = None,
        observer: EvictionObserver | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which candidates stay, and the numbers that go on with each token.

        Args:
            numbers: see :meth:`Policy.rank`.

        Returns:
            [H, n] bool with ``budget - window`` true per head, and the policy's numbers.
        """
        limits = candidates.limits
        priority, numbers = self.policy.rank(candidates, numbers)
        if priority.shape != (len(candidates.queries), candidates.num):
            raise EvictionError(
                f"--kv-eviction {self.policy.name}: priority must have the shape "
                f"{(len(candidates.queries), candidates.num)}, got {tuple(priority.shape)}"
            )
        shape = len(priority), self.policy.num_numbers, candidates.num + limits.window
        if numbers is not None and numbers.shape != shape:
            raise EvictionError(
                f"--kv-eviction {self.policy.name}: numbers must have the shape {shape}, got "
                f"{tuple(numbers.shape)}"
            )
        self._watch_for_nan(candidates, priority)
        priority[:, : limits.fixed] = torch.inf
        keep = largest(priority, limits.budget - limits.window)
        if observer is not None:
            observer.observe(candidates, priority, keep)
        return keep, numbers

    @cached_property
    def _token_state(self) -> TokenStateLayout:
        """Where the policy's numbers lie."""
        spec = self.spec
        return self.config.token_state(spec.block_size, spec.head_size, spec.dtype)

    def _load_numbers(
        self, kv_caches: list[torch.Tensor], state_blocks: torch.Tensor, limits: EvictionLimits
    ) -> torch.Tensor:
        """[H, num_numbers, budget] fp32 of the candidates; 0 in the slots of a kept prompt."""
        layout = self._token_state
        of_layers = [
            load_numbers(layout, cache, state_blocks[: layout.num_blocks]) for cache in kv_caches
        ]
        numbers = torch.cat(of_layers)[..., : limits.budget - limits.kept]
        return pad(numbers, (limits.kept, 0))

    def _store_numbers(
        self, kv_caches: list[torch.Tensor], state_blocks: torch.Tensor, numbers: torch.Tensor
    ) -> None:
        """Keep [H, num_numbers, tokens] fp32 of the survivors, in slot order."""
        layout = self._token_state
        of_layers = numbers.chunk(len(kv_caches))
        for cache, of_layer in zip(kv_caches, of_layers, strict=True):
            store_numbers(layout, cache, state_blocks[: layout.num_blocks], of_layer)

    def _watch_for_nan(self, candidates: Candidates, priority: torch.Tensor) -> None:
        """Warn of a request whose priorities are NaN, once the device has found that they are."""
        key = candidates.draws.eviction.key
        nan_keys = torch.where(priority.isnan().any(), key, NOT_NAN).to(torch.int32)[None]
        self.nan_warnings.watch(nan_keys, np.array([candidates.first]))

    def _move(
        self,
        kv_caches: list[torch.Tensor],
        blocks: torch.Tensor,
        head: torch.Tensor,
        source: torch.Tensor,
        destination: torch.Tensor,
    ) -> None:
        """Move the survivors above the budget into freed slots.

        Args:
            kv_caches: of layers that are ranked together.
            blocks: [n] int64, the blocks of the sequence's slots.
            head, source, destination: see :func:`plan_moves`; the heads of the layers count on.
        """
        block_size, num_layers = self.spec.block_size, len(kv_caches)
        parts = (
            head % len(self.kv_heads),
            blocks[source // block_size],
            source % block_size,
            blocks[destination // block_size],
            destination % block_size,
        )
        # As many moves for each head.
        of_layers = zip(*(part.chunk(num_layers) for part in parts), strict=True)
        for cache, moves in zip(kv_caches, of_layers, strict=True):
            own_head, *places = moves
            self.page_layout.copy(cache, own_head, tuple(places[:2]), tuple(places[2:]))
