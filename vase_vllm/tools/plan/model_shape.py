"""Reads the shape of a model from its config, without loading weights."""

from pathlib import Path

from vase_vllm.tools.plan import closed_form
from vase_vllm.tools.plan.architecture import Architecture
from vase_vllm.tools.plan.cost import ModelShape
from vase_vllm.tools.plan.model_files import find_directory, read_config, weight_bytes
from vase_vllm.tools.requirements import missing

ELEMENT_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
DTYPES = ("auto", *ELEMENT_SIZES)


def read_model_shape(model: str, dtype: str = "auto") -> tuple[ModelShape, int]:
    """Read the shape of a model from its config.

    Common families are read from ``config.json`` alone (:mod:`~vase_vllm.tools.plan.closed_form`),
    all others by transformers. The size of the weights is that of the safetensors files next to the
    config, if these have the served dtype or are quantized; otherwise it is the number of
    parameters times the size of the dtype.

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
    directory = find_directory(model)
    try:
        found = _describe(directory)
        served = _served_dtype(found.dtype, dtype)
        num_bytes = _weight_bytes(directory, found, served)
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None
    shape = ModelShape(
        num_layers=found.num_layers,
        num_query_heads=found.num_query_heads,
        num_kv_heads=found.num_kv_heads,
        head_size=found.head_size,
        hidden_size=found.hidden_size,
        element_size=ELEMENT_SIZES[served],
        num_params=found.num_params,
        weight_bytes=num_bytes,
        lookup_fraction=found.lookup_params / found.num_params,
        expert_fraction=found.expert_params / found.num_params,
        num_experts=found.num_experts,
        num_experts_per_token=found.num_experts_per_token,
    )
    return shape, found.max_position_embeddings


def _describe(directory: Path) -> Architecture:
    config = read_config(directory)
    try:
        return closed_form.from_config(config)
    except closed_form.NoClosedFormError as error:
        if missing(["transformers", "torch"]):
            raise ValueError(
                f"{error}: plan needs transformers and torch for it: "
                "run pip install transformers torch"
            ) from None
    from vase_vllm.tools.plan.transformers_model import from_transformers

    return from_transformers(directory)


def _served_dtype(stored: str, dtype: str) -> str:
    served = dtype if dtype != "auto" else {"float32": "bfloat16"}.get(stored, stored)
    if served not in ELEMENT_SIZES:
        raise ValueError(f"dtype {served} is not supported: use {', '.join(ELEMENT_SIZES)}")
    return served


def _weight_bytes(directory: Path, found: Architecture, served: str) -> int:
    on_disk = weight_bytes(directory)
    if on_disk and (found.is_quantized or found.dtype == served):
        return on_disk
    if found.is_quantized:
        raise ValueError(
            "the weights are quantized, so their size is unknown without their files: download "
            "the model and give its directory"
        )
    return found.num_params * ELEMENT_SIZES[served]
