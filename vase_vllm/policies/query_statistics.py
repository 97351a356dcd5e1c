"""Statistics of a model's queries before RoPE, and the file that they are kept in.

RoPE turns pairs of dimensions. A pair of a query is a complex number here, ``q_f``, and turning it
by its position p is a product with ``exp(i w_f p)``.

Shapes: L layers, Q query heads, D head size, F = D / 2 pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vase_vllm.errors import EvictionError
from vase_vllm.policies.base import AttentionShape

FORMAT = "vase-vllm query statistics 1"
"""What the metadata of a file must say."""
HOST = torch.device("cpu")


@dataclass(frozen=True)
class QueryStatistics:
    """What the queries of each query head are like before RoPE, over many tokens.

    Attributes:
        mean: [L, Q, F] complex64, the mean of ``q_f``.
        mean_length: [L, Q, F] fp32, the mean of ``|q_f|``.
        frequencies: [L, F] float64, ``w_f`` in radians per token; 0 of a pair that is not turned.
        pairs: [2, F] int64, which dimension is the real part of each pair, and which the
            imaginary one.
        num_kv_heads: KV heads, each of which serves as many query heads in a row.
        origin: what was measured, in words: the model, the texts, the number of tokens.
    """

    mean: torch.Tensor
    mean_length: torch.Tensor
    frequencies: torch.Tensor
    pairs: torch.Tensor
    num_kv_heads: int
    origin: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_layers, num_query_heads, num_pairs = self.mean.shape
        if (
            self.mean_length.shape != self.mean.shape
            or self.frequencies.shape != (num_layers, num_pairs)
            or self.pairs.flatten().sort().values.tolist() != list(range(2 * num_pairs))
            or self.num_kv_heads < 1
            or num_query_heads % self.num_kv_heads
        ):
            raise EvictionError("the statistics' tensors do not fit each other: measure them anew")

    @property
    def shape(self) -> AttentionShape:
        """The shape of the model that was measured."""
        num_layers, num_query_heads, num_pairs = self.mean.shape
        return AttentionShape(num_layers, num_query_heads, self.num_kv_heads, 2 * num_pairs)

    def by_kv_head(self, of_query_heads: torch.Tensor) -> torch.Tensor:
        """``[L, Q, F]`` as ``[L, KV heads, G, F]``."""
        return of_query_heads.unflatten(1, (self.num_kv_heads, -1))

    def save(self, path: Path) -> None:
        """Write the file.

        Raises:
            EvictionError: it cannot be written.
        """
        tensors = {
            "mean": torch.view_as_real(self.mean).contiguous(),
            "mean_length": self.mean_length.contiguous(),
            "frequencies": self.frequencies.contiguous(),
            "pairs": self.pairs.contiguous(),
        }
        metadata = {**self.origin, "format": FORMAT, "num_kv_heads": str(self.num_kv_heads)}
        try:
            save_file(tensors, path, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise EvictionError(f"{path}: {_first_line(error)}") from None


@cache
def read_statistics(path: str, device: torch.device = HOST) -> QueryStatistics:
    """Read a file, once per process and device.

    Args:
        device: where the statistics are wanted.

    Raises:
        EvictionError: the file is missing, unreadable or something else; one line.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise EvictionError(f"{path} cannot be read: {_first_line(error)}") from None
    if metadata.pop("format", None) != FORMAT:
        raise EvictionError(
            f"{path} has no statistics of queries: give a file that vase-vllm calibrate has written"
        )
    return QueryStatistics(
        mean=torch.view_as_complex(tensors["mean"]),
        mean_length=tensors["mean_length"],
        frequencies=tensors["frequencies"],
        pairs=tensors["pairs"],
        num_kv_heads=int(metadata.pop("num_kv_heads")),
        origin=metadata,
    )


def rotation_pairs(head_size: int, rotary_dim: int, is_neox_style: bool) -> torch.Tensor:
    """Which dimensions RoPE turns together: [2, head_size / 2] int64.

    The two halves of the first ``rotary_dim`` dimensions are the real and the imaginary parts, or
    neighbours are. Dimensions behind them, which are not turned, form pairs in the same way.

    >>> rotation_pairs(8, 4, is_neox_style=True)
    tensor([[0, 1, 4, 5],
            [2, 3, 6, 7]])
    >>> rotation_pairs(8, 4, is_neox_style=False)
    tensor([[0, 2, 4, 6],
            [1, 3, 5, 7]])
    """
    turned_and_not = torch.arange(head_size).split([rotary_dim, head_size - rotary_dim])
    if is_neox_style:
        pairs = [part.view(2, len(part) // 2) for part in turned_and_not]
    else:
        pairs = [part.view(len(part) // 2, 2).T for part in turned_and_not]
    return torch.cat(pairs, dim=1)


def as_pairs(vectors: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Vectors as complex numbers: [..., D] fp32 to [..., F] complex64."""
    return torch.complex(vectors[..., pairs[0]], vectors[..., pairs[1]])


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
