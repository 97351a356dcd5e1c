"""Sees the queries of an engine's model before RoPE turns them, and adds them up."""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vase_vllm.errors import EvictionError
from vase_vllm.policies.query_statistics import as_pairs
from vase_vllm.tools.calibration.rotation import Rotation

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.model_executor.layers.attention import Attention

TOLERANCE = 0.05
"""Relative error of a turned query that rounding to bf16 does not reach."""


@dataclass
class LayerSums:
    """What was seen of one layer.

    Attributes:
        rotation: of its queries.
        queries: [Q, F] complex128, the sum of the queries, times what RoPE scaling puts on them.
        lengths: [Q, F] float64, the sum of the lengths of their pairs.
        num_tokens: queries of each head.
    """

    rotation: Rotation
    queries: torch.Tensor
    lengths: torch.Tensor
    num_tokens: int = 0

    def add(self, queries: torch.Tensor) -> None:
        """Add the queries of a step: [tokens, Q, F] complex128."""
        self.queries += queries.sum(dim=0)
        self.lengths += queries.abs().sum(dim=0)
        self.num_tokens += len(queries)


class QueryCollector:
    """Hooks into an engine of this process.

    A rotary embedding may serve many layers. The layer that a query belongs to is the one whose
    attention is called next. What arrives there must be the query that was seen, turned as the
    rotary embedding says: else this is not the rotation that a policy would reckon with.
    """

    def __init__(self, llm: "LLM") -> None:
        """Register the hooks.

        Raises:
            EvictionError: the model has no layer that evicts.
        """
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
        from vllm.model_executor.models.utils import extract_layer_index

        from vase_vllm.support import attention_shape
        from vase_vllm.worker.backend import full_attention_layers

        vllm_config = llm.llm_engine.vllm_config
        self.shape = attention_shape(vllm_config.model_config)
        evicting = full_attention_layers(vllm_config)
        self._wanted = sorted(map(extract_layer_index, evicting))
        if not self._wanted:
            raise EvictionError("the model has no full-attention layer, so that nothing is evicted")
        self._rotations: dict[Any, Rotation] = {}
        self._pending: tuple[Rotation, torch.Tensor, torch.Tensor] | None = None
        self._sums: dict[int, LayerSums] = {}
        (modules,) = llm.apply_model(lambda model: list(model.modules()))
        for module in modules:
            if isinstance(module, RotaryEmbedding):
                module.register_forward_pre_hook(self._before_rotation, with_kwargs=True)
        for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items():
            index = extract_layer_index(name) if name in evicting else None
            hook = partial(self._before_attention, index)
            layer.register_forward_pre_hook(hook, with_kwargs=True)

    def _before_rotation(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = args[0] if args else kwargs["positions"]
        query = args[1] if len(args) > 1 else kwargs["query"]
        if module not in self._rotations:
            self._rotations[module] = Rotation.of(module)
        # A copy: kernels turn queries in place.
        before = query.detach().to("cpu", torch.float32, copy=True)
        self._pending = self._rotations[module], positions.flatten().cpu(), before

    def _before_attention(
        self, index: int | None, layer: "Attention", args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        pending, self._pending = self._pending, None
        if pending is None or index is None:
            return
        rotation, positions, before = pending
        shape = (len(positions), layer.num_heads, layer.head_size)
        if before.numel() != math.prod(shape):
            return
        queries = as_pairs(before.view(shape), rotation.pairs) * rotation.scale
        query = args[0] if args else kwargs["query"]
        after = as_pairs(query.detach().float().cpu().view(shape), rotation.pairs)
        difference = after - rotation.turned(queries, positions)
        if difference.norm() <= TOLERANCE * queries.norm():
            if index not in self._sums:
                nothing = torch.zeros_like(queries[0])
                self._sums[index] = LayerSums(rotation, nothing, nothing.real.clone())
            self._sums[index].add(queries)

    def sums(self, num_tokens: int) -> dict[int, LayerSums]:
        """What was seen of each layer that evicts, by its index.

        Args:
            num_tokens: how many queries of each head there must be.

        Raises:
            EvictionError: queries were not seen, or layers differ in shape; one line.
        """
        for index in self._wanted:
            count = self._sums[index].num_tokens if index in self._sums else 0
            if count != num_tokens:
                raise EvictionError(
                    f"layer {index}: {count} of {num_tokens} queries were seen before plain RoPE; "
                    "triattention cannot be used if the model turns them in another way or not at "
                    "all; if a fused kernel hides them, calibrate on a CPU"
                )
        seen = {index: self._sums[index] for index in self._wanted}
        size = (self.shape.num_query_heads, self.shape.head_size // 2)
        pairs = seen[self._wanted[0]].rotation.pairs
        for index, of_layer in seen.items():
            if of_layer.queries.shape != size or not torch.equal(of_layer.rotation.pairs, pairs):
                raise EvictionError(
                    f"layer {index}: triattention needs layers of one shape, and this one has not "
                    f"that of {self.shape}"
                )
        return seen
