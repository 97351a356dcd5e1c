"""What a decode step needs beyond vLLM's own metadata, whatever the device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from vase_vllm.config import EvictionConfig
from vase_vllm.worker.counters import EvictionCounters
from vase_vllm.worker.evictor import EvictionObserver
from vase_vllm.worker.pages import PageLayout
from vase_vllm.worker.row_headers import RowHeaders


class RingWrite(Protocol):
    """Stores one layer's queries of the step into the query rings."""

    def store(self, kv_cache: torch.Tensor, query: torch.Tensor) -> None:
        """``query``: [tokens, query heads, head size]; ``kv_cache``: that of the layer."""


@dataclass(frozen=True)
class PreparedStep:
    """What the wrapped builder sees in place of vLLM's own metadata, and where the queries go.

    Attributes:
        seq_lens: [R] int32, tokens that each sequence has cached after the step.
        seq_lens_cpu: the same on the host.
        max_seq_len: at least the largest of them.
        block_table: [R, columns] int32, token blocks only.
        ring_write: of this step; None if no query is stored.
    """

    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    max_seq_len: int
    block_table: torch.Tensor
    ring_write: RingWrite | None


class StepPath(Protocol):
    """How a device evicts and remaps.

    Attributes:
        layers: layer index to the layer, of one builder.
        page_layout: of these layers' KV caches.
    """

    layers: dict[int, Attention]
    page_layout: PageLayout

    def prepare(self, common: CommonAttentionMetadata, capturing: bool) -> PreparedStep:
        """Evict from the sequences that are due and rewrite the step's slot mapping in place.

        The forward context holds the same slot mapping, and several builders may rewrite it: the
        result depends on the step and the block table alone. Padding and dummy rows have a header
        of zeros and neither evict nor write.

        Args:
            capturing: a CUDA graph is about to be captured with this step's tensors.
        """


@dataclass
class StepContext:
    """What all builders of a worker share.

    Attributes:
        observer: looks at all evictions while it is set. They then run in plain torch on a GPU too,
            for the fused kernel does not tell what it kept.
        paths: of the builders, each of which adds its own.
        runs_in_triton: whether any layer's evictions and queries are the Triton kernels' work.
        scratch: [bytes] uint8, what the fused kernel works in; None where it does not run. The
            evictions of all builders share it, for they run one after the other.
    """

    config: EvictionConfig
    vllm_config: VllmConfig
    device: torch.device
    counters: EvictionCounters
    row_headers: RowHeaders
    observer: EvictionObserver | None = None
    paths: list[StepPath] = field(default_factory=list)
    runs_in_triton: bool = False
    scratch: torch.Tensor | None = None

    def kv_heads(self, num_local_heads: int) -> torch.Tensor:
        """Indices in the whole model of this rank's KV heads: [num_local_heads] int64.

        vLLM shards the heads over tensor-parallel ranks, or replicates them if there are fewer
        heads than ranks. Draws keyed by these do not depend on the degree of parallelism.
        """
        rank = get_tensor_model_parallel_rank()
        num_heads = self.vllm_config.model_config.get_total_num_kv_heads()
        start = rank * num_heads // get_tensor_model_parallel_world_size()
        return torch.arange(start, start + num_local_heads)


PathFactory = Callable[..., StepPath]
