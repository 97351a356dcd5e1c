"""Describes any model that transformers knows, without loading weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vase_vllm.tools.plan.architecture import Architecture, check_layers, number_of_experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def from_transformers(directory: Path) -> Architecture:
    """Describe a model by transformers' config class and its parameters on the meta device.

    Args:
        directory: has the ``config.json``.

    Raises:
        ValueError: the config cannot be read, or the model is not supported; one line.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"the config cannot be read: {_first_line(error)}") from None
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("encoder-decoder models are not supported")
    if getattr(text, "kv_lora_rank", None):
        raise ValueError("models with multi-head latent attention (MLA) are not supported")
    for name in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        if not isinstance(getattr(text, name, None), int):
            raise ValueError(f"the config has no {name}")
    check_layers(
        getattr(text, "layer_types", None),
        getattr(text, "sliding_window", None),
        text.max_position_embeddings,
    )
    sizes, lookup = _count_params(config)
    num_query_heads = text.num_attention_heads
    return Architecture(
        num_layers=text.num_hidden_layers,
        num_query_heads=num_query_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_query_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // num_query_heads,
        hidden_size=text.hidden_size,
        max_position_embeddings=text.max_position_embeddings,
        dtype=str(getattr(text, "dtype", None) or "float32").removeprefix("torch."),
        is_quantized=getattr(config, "quantization_config", None) is not None,
        num_params=sum(sizes.values()),
        lookup_params=lookup,
        expert_params=sum(size for name, size in sizes.items() if ".experts." in name),
        num_experts=number_of_experts(text.to_dict()),
        num_experts_per_token=getattr(text, "num_experts_per_tok", 0)
        or getattr(text, "num_experts_per_token", 0),
    )


def _count_params(config: "PretrainedConfig") -> tuple[dict[str, int], int]:
    """Count parameters on an instance on the meta device, which has no storage.

    Returns:
        The elements of each parameter by its name, and those of an input embedding that is not
        tied to the output head.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # A config that nests its text config has a model of the second class only.
    is_nested = config.get_text_config() is not config
    model_class: Any = AutoModelForImageTextToText if is_nested else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            instance = model_class.from_config(config)
    except Exception as error:
        raise ValueError(f"its parameters cannot be counted: {_first_line(error)}") from None
    sizes = {name: parameter.numel() for name, parameter in instance.named_parameters()}
    tied = config.get_text_config().tie_word_embeddings
    return sizes, 0 if tied else instance.get_input_embeddings().weight.numel()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
