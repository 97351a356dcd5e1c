"""How an engine's rotary embedding turns queries and keys, read from the module itself."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vase_vllm.policies.query_statistics import rotation_pairs

if TYPE_CHECKING:
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding


@dataclass(frozen=True)
class Rotation:
    """One rotary embedding, whatever its scaling.

    Attributes:
        frequencies: [F] float64, in radians per token; 0 of a pair that is not turned.
        scale: [F] float64, what RoPE scaling multiplies queries and keys with (YaRN's factor).
        pairs: [2, F] int64, the dimensions of each pair.
    """

    frequencies: torch.Tensor
    scale: torch.Tensor
    pairs: torch.Tensor

    @classmethod
    def of(cls, module: "RotaryEmbedding") -> "Rotation":
        """That of a module of vLLM.

        The module's own table is computed anew, for the one that it holds has the model's dtype.
        """
        table = module._compute_cos_sin_cache()
        found = table_frequencies(table)
        num_pairs = module.head_size // 2
        frequencies = torch.zeros(num_pairs, dtype=torch.float64)
        scale = torch.ones(num_pairs, dtype=torch.float64)
        frequencies[: len(found)] = found
        scale[: len(found)] = table[0, : len(found)].double()  # the cosine of 0
        pairs = rotation_pairs(module.head_size, module.rotary_dim, module.is_neox_style)
        return cls(frequencies, scale, pairs)

    def turned(self, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Vectors after RoPE.

        Args:
            vectors: [tokens, heads, F] complex, already multiplied with ``scale``.
            positions: [tokens].
        """
        angles = positions.double()[:, None] * self.frequencies
        return vectors * torch.polar(torch.ones_like(angles), angles)[:, None]


def table_frequencies(table: torch.Tensor) -> torch.Tensor:
    """The frequencies that a table of cosines and sines was made of.

    An angle is known up to whole turns. The one at position 1 is the frequency, with the table's
    rounding error; the one at 2 then says it with half of the error, and so on.

    >>> frequencies = torch.tensor([1.0, 0.01])
    >>> angles = torch.arange(100)[:, None] * frequencies
    >>> table_frequencies(torch.cat([angles.cos(), angles.sin()], dim=-1))
    tensor([1.0000, 0.0100], dtype=torch.float64)

    Args:
        table: [positions, 2 * frequencies], cosines first.

    Returns:
        [frequencies] float64, in radians per token.
    """
    found = torch.zeros(table.shape[-1] // 2, dtype=torch.float64)
    position = 1
    while position < len(table):
        cosine, sine = table[position].double().cpu().chunk(2)
        angle = torch.atan2(sine, cosine)
        turns = torch.round((found * position - angle) / math.tau)
        found = (angle + math.tau * turns) / position
        position *= 2
    return found
