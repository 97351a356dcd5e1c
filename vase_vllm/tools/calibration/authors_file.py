"""Reads the statistics that TriAttention's authors publish, github.com/WeianMao/triattention.

Theirs is a file of torch: ``metadata`` with ``rope_style`` (``half`` or ``interleaved``), and
``stats`` with ``q_mean_real``, ``q_mean_imag`` and ``q_abs_mean`` of each query head, under names
such as ``layer00_head00``. The frequencies of RoPE are not in it.
"""

import pickle
from pathlib import Path

import torch

from vase_vllm.errors import EvictionError
from vase_vllm.policies.base import AttentionShape
from vase_vllm.policies.query_statistics import rotation_pairs

IS_NEOX_STYLE = {"half": True, "interleaved": False}
"""By their names of how RoPE pairs dimensions."""
UNREADABLE = (
    OSError,
    RuntimeError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
)
"""What reading something else than their file may raise."""


def read_authors_file(
    path: Path, shape: AttentionShape, pairs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean queries before RoPE, and the mean lengths of their pairs.

    Args:
        shape: of the model.
        pairs: [2, F] int64, the dimensions that the model's RoPE turns together.

    Returns:
        ([L, Q, F] complex64, [L, Q, F] fp32).

    Raises:
        EvictionError: the file cannot be read, or is of another model; one line.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it has a {type(content).__name__}, where a dictionary should be")
        is_neox_style = IS_NEOX_STYLE[content["metadata"]["rope_style"]]
        heads = [
            [
                content["stats"][f"layer{layer:02d}_head{head:02d}"]
                for head in range(shape.num_query_heads)
            ]
            for layer in range(shape.num_layers)
        ]
        real, imaginary, length = (
            torch.stack([torch.stack([head[name].float() for head in layer]) for layer in heads])
            for name in ("q_mean_real", "q_mean_imag", "q_abs_mean")
        )
    except KeyError as error:
        raise EvictionError(
            f"--convert {path}: it has no {error}, so that it is not of this model ({shape}) or "
            "not the authors' file"
        ) from None
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        raise EvictionError(f"--convert {path} cannot be read: {reason}") from None
    others = f"layer00_head{shape.num_query_heads:02d}", f"layer{shape.num_layers:02d}_head00"
    if real.shape[-1] != shape.head_size // 2 or any(name in content["stats"] for name in others):
        raise EvictionError(f"--convert {path}: it is not of this model ({shape})")
    if not torch.equal(rotation_pairs(shape.head_size, shape.head_size, is_neox_style), pairs):
        raise EvictionError(f"--convert {path}: RoPE turns other pairs of dimensions in this model")
    return torch.complex(real, imaginary), length
