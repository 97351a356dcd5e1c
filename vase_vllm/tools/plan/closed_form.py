"""Counts the parameters of common decoders from a few sizes in their ``config.json``.

This needs neither transformers nor torch. It serves the families of :data:`FAMILIES`, whose layers
are all alike: attention, an MLP of three matrices or routed experts of the same form, two norms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vase_vllm.tools.plan.architecture import Architecture, check_layers, number_of_experts


class NoClosedFormError(ValueError):
    """The closed form does not hold for this config; the message says why."""


@dataclass(frozen=True)
class Family:
    """What tells a family's layers from Llama's.

    Attributes:
        has_qkv_bias: whether queries, keys and values have a bias.
        has_qk_norm: whether queries and keys are normalized, with ``head_size`` weights each.
        has_sliding_window: whether ``sliding_window`` holds for all layers, unless it is null.
        expert_size: key of the width of an expert; None in a dense family.
        needs: further keys that a config must have, because transformers' default for them is that
            of one model.
    """

    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_sliding_window: bool = False
    expert_size: str | None = None
    needs: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family(),
    "mistral": Family(has_sliding_window=True, needs=("sliding_window",)),
    "mixtral": Family(
        has_sliding_window=True, expert_size="intermediate_size", needs=("num_experts_per_tok",)
    ),
    "phi3": Family(has_sliding_window=True),
    "qwen2": Family(has_qkv_bias=True),
    "qwen3": Family(has_qk_norm=True, needs=("head_dim",)),
    "qwen3_moe": Family(
        has_qk_norm=True,
        expert_size="moe_intermediate_size",
        needs=("moe_intermediate_size", "num_experts_per_tok"),
    ),
}
"""By ``model_type``. A test holds each to the parameters that transformers counts."""
SIZES = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"),
    *("intermediate_size", "vocab_size", "max_position_embeddings"),
)
VARIANTS = ("attention_bias", "mlp_bias", "mlp_only_layers", "use_sliding_window")
"""Keys that make layers differ from the closed form; absent or false in nearly every config."""


def from_config(config: Mapping[str, Any]) -> Architecture:
    """Describe a model by the closed form of its family.

    With hidden size h, head size D, Q query heads, H KV heads, MLP or expert width i, E experts
    and vocabulary V, a layer has ``2 h (Q + H) D`` parameters of attention, ``3 h i`` of an MLP or
    ``E (3 h i + h)`` of experts and their router, and ``2 h`` of norms; the model has ``V h`` more
    for each of embedding and head, and ``h`` for its last norm.

    Args:
        config: the content of a ``config.json``.

    Raises:
        NoClosedFormError: the family is not known, a size is missing, or the layers differ.
        ValueError: the model is not supported; one line.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise NoClosedFormError(f"models of type {kind}")
    family = FAMILIES[kind]
    absent = [key for key in SIZES if config.get(key) is None]
    absent += [key for key in family.needs if key not in config]
    if absent:
        raise NoClosedFormError(f"a config without {absent[0]}")
    if variant := next((key for key in VARIANTS if config.get(key)), None):
        raise NoClosedFormError(f"a config with {variant}")
    if config.get("decoder_sparse_step", 1) != 1:
        raise NoClosedFormError("a config with decoder_sparse_step")
    num_experts = number_of_experts(config) if family.expert_size else 0
    if family.expert_size and not num_experts:
        raise NoClosedFormError("a config without the number of experts")
    longest = config["max_position_embeddings"]
    window = config.get("sliding_window") if family.has_sliding_window else None
    check_layers(config.get("layer_types"), window, longest)

    num_layers, hidden_size = config["num_hidden_layers"], config["hidden_size"]
    num_queries, num_keys = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or hidden_size // num_queries
    layer = 2 * hidden_size * (num_queries + num_keys) * head_size + 2 * hidden_size
    layer += family.has_qkv_bias * (num_queries + 2 * num_keys) * head_size
    layer += family.has_qk_norm * 2 * head_size
    experts = 0
    if family.expert_size:
        experts = num_experts * 3 * hidden_size * config[family.expert_size]
        layer += num_experts * hidden_size
    else:
        layer += 3 * hidden_size * config["intermediate_size"]
    embedding = config["vocab_size"] * hidden_size
    lookup = 0 if config.get("tie_word_embeddings") else embedding
    return Architecture(
        num_layers=num_layers,
        num_query_heads=num_queries,
        num_kv_heads=num_keys,
        head_size=head_size,
        hidden_size=hidden_size,
        max_position_embeddings=longest,
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
        is_quantized=config.get("quantization_config") is not None,
        num_params=num_layers * (layer + experts) + hidden_size + embedding + lookup,
        lookup_params=lookup,
        expert_params=num_layers * experts,
        num_experts=num_experts,
        num_experts_per_token=config["num_experts_per_tok"] if num_experts else 0,
    )
