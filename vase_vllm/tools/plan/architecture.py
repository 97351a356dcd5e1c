"""What a plan needs to know of a model, wherever it is read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A model as its config describes it.

    Attributes:
        num_layers, num_query_heads, num_kv_heads, head_size, hidden_size: as in
            :class:`~vase_vllm.tools.plan.cost.ModelShape`.
        max_position_embeddings: tokens of the longest sequence.
        dtype: of the weights, such as ``bfloat16``; ``float32`` if the config does not name it.
        is_quantized: whether the config names a quantization of the weights.
        num_params: parameters.
        lookup_params: those of the input embedding, unless it is tied to the output head.
        expert_params: those of routed experts.
        num_experts, num_experts_per_token: routed experts of a layer, and those that a token is
            routed to; 0 in a dense model.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    max_position_embeddings: int
    dtype: str
    is_quantized: bool
    num_params: int
    lookup_params: int
    expert_params: int
    num_experts: int
    num_experts_per_token: int


def number_of_experts(config: Mapping[str, Any]) -> int:
    """Routed experts of a layer, by any of the names that families give it; 0 if there are none."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((value for name in names if (value := config.get(name))), 0)


def check_layers(
    layer_types: Iterable[str] | None, sliding_window: int | None, max_position_embeddings: int
) -> None:
    """Refuse a model that has layers without full attention.

    Args:
        layer_types: kind of each layer, or None if all are alike.
        sliding_window: tokens that each layer attends to, or None for all. It counts only where
            there are no ``layer_types``.

    Raises:
        ValueError: one line.
    """
    kinds = set(layer_types or ()) - {"full_attention"}
    if layer_types is None and sliding_window and sliding_window < max_position_embeddings:
        kinds = {"sliding_attention"}
    if kinds:
        raise ValueError(
            f"only full-attention layers are supported, this has {', '.join(sorted(kinds))}"
        )
