"""Which instruction sets vLLM's CPU attention was built for: it ships one build a processor."""

import pytest
import torch
from vllm import _custom_ops as ops


def require_instruction_set(isa: str, head_size: int, dtype: torch.dtype) -> None:
    """Skip a test of a page packing that this processor's build of vLLM cannot write."""
    part = torch.zeros(64, 1, head_size, dtype=dtype)
    keys, values = torch.zeros(1, 1, 128, head_size, dtype=dtype).chunk(2, dim=2)
    try:
        ops.cpu_attn_reshape_and_cache(part, part, keys, values, torch.arange(64), isa)
    except RuntimeError as error:
        if "Unsupported CPU attention configuration" not in str(error):
            raise
        pytest.skip(f"vLLM's build for this processor has no {isa} attention")
