"""Reads the shape of a model from its config, without loading weights."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vase_vllm.tools.plan.cost import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ELEMENT_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
DTYPES = ("auto", *ELEMENT_SIZES)


def read_model_shape(model: str, dtype: str = "auto") -> tuple[ModelShape, int]:
    """Read the shape of a model from its config.

    Parameters are counted on an instance on the meta device, which has no storage. The size of the
    weights is that of the safetensors files next to the config, if these have the served dtype or
    are quantized; otherwise it is the number of parameters times the size of the dtype.

    Args:
        model: a local directory, or an id on the Hugging Face Hub.
        dtype: dtype of weights and KV cache. ``auto`` is the dtype of the config, with bfloat16
            instead of float32, as in vLLM.

    Returns:
        The shape, and the length of the longest sequence that the config allows.

    Raises:
        ValueError: the config cannot be read, or the model is not supported; the message is one
            line.
    """
    config = _load_config(model)
    text = config.get_text_config()
    if reason := _unsupported(config, text):
        raise ValueError(f"{model}: {reason}")
    stored = str(getattr(text, "dtype", None) or "float32").removeprefix("torch.")
    served = dtype if dtype != "auto" else {"float32": "bfloat16"}.get(stored, stored)
    if served not in ELEMENT_SIZES:
        raise ValueError(
            f"{model}: dtype {served} is not supported: use {', '.join(ELEMENT_SIZES)}"
        )
    counts = _count_params(model, config)
    weight_bytes = _weight_bytes(model, config, counts["all"], stored, served)
    num_query_heads = text.num_attention_heads
    shape = ModelShape(
        num_layers=text.num_hidden_layers,
        num_query_heads=num_query_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_query_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // num_query_heads,
        hidden_size=text.hidden_size,
        element_size=ELEMENT_SIZES[served],
        num_params=counts["all"],
        weight_bytes=weight_bytes,
        lookup_fraction=counts["lookup"] / counts["all"],
        expert_fraction=counts["experts"] / counts["all"],
        num_experts=_first(text, "num_experts", "num_local_experts", "n_routed_experts"),
        num_experts_per_token=_first(text, "num_experts_per_tok", "num_experts_per_token"),
    )
    return shape, text.max_position_embeddings


def _first(config: "PretrainedConfig", *names: str) -> int:
    return next((value for name in names if (value := getattr(config, name, None))), 0)


def _load_config(model: str) -> "PretrainedConfig":
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), "unknown reason")
        raise ValueError(f"{model}: the config cannot be read: {reason}") from None


def _unsupported(config: "PretrainedConfig", text: "PretrainedConfig") -> str | None:
    """Return why a model is not supported, or None if it is."""
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder models are not supported"
    if getattr(text, "kv_lora_rank", None):
        return "models with multi-head latent attention (MLA) are not supported"
    missing = [
        name
        for name in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        if not isinstance(getattr(text, name, None), int)
    ]
    if missing:
        return f"the config has no {missing[0]}"
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"only full-attention layers are supported, this has {', '.join(sorted(kinds))}"
    return None


def _count_params(model: str, config: "PretrainedConfig") -> dict[str, int]:
    """Count all parameters, those of an untied input embedding, and those of routed experts."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            instance: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{model}: its parameters cannot be counted: {reason}") from None
    sizes = {name: parameter.numel() for name, parameter in instance.named_parameters()}
    tied = config.get_text_config().tie_word_embeddings
    return {
        "all": sum(sizes.values()),
        "lookup": 0 if tied else instance.get_input_embeddings().weight.numel(),
        "experts": sum(size for name, size in sizes.items() if ".experts." in name),
    }


def _weight_bytes(
    model: str, config: "PretrainedConfig", num_params: int, stored: str, served: str
) -> int:
    on_disk = _safetensors_bytes(Path(model))
    quantized = getattr(config, "quantization_config", None) is not None
    if on_disk and (quantized or stored == served):
        return on_disk
    if quantized:
        raise ValueError(
            f"{model}: the weights are quantized, so their size is unknown without their files: "
            "download the model and give its directory"
        )
    return num_params * ELEMENT_SIZES[served]


def _safetensors_bytes(directory: Path) -> int:
    """Bytes of the safetensors files in a directory, from their index if there is one; else 0."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return int(json.loads(index.read_text()).get("metadata", {}).get("total_size", 0))
    return sum(_tensor_bytes(path) for path in directory.glob("model*.safetensors"))


def _tensor_bytes(path: Path) -> int:
    """Bytes of a safetensors file without its header, whose length is in the first 8 bytes."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header
