"""The contiguous cache of one layer."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class LayerCache:
    """Keys, values and positions that one layer holds, in order of position in every KV head.

    Attributes:
        keys: [KV heads, length, D], float32, after RoPE.
        values: [KV heads, length, D], float32.
        positions: [KV heads, length], int64, true positions.
        queries: [query heads, at most W, D], float32, after RoPE, of the newest positions.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    queries: torch.Tensor

    @classmethod
    def empty(cls, attention: nn.Module) -> "LayerCache":
        """The cache of an attention module before the first token."""
        head_dim = attention.head_dim
        query_heads = attention.q_proj.out_features // head_dim
        kv_heads = attention.k_proj.out_features // head_dim
        return cls(
            keys=torch.empty(kv_heads, 0, head_dim),
            values=torch.empty(kv_heads, 0, head_dim),
            positions=torch.empty(kv_heads, 0, dtype=torch.int64),
            queries=torch.empty(query_heads, 0, head_dim),
        )

    def append(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        window: int,
    ) -> None:
        """Add m tokens.

        Args:
            queries: [query heads, m, D], float32, after RoPE.
            keys: [KV heads, m, D], float32, after RoPE.
            values: [KV heads, m, D], float32.
            positions: [m], int64.
            window: W, how many of the newest queries to remember.
        """
        self.keys = torch.cat([self.keys, keys], dim=1)
        self.values = torch.cat([self.values, values], dim=1)
        positions = positions.expand(self.positions.shape[0], -1)
        self.positions = torch.cat([self.positions, positions], dim=1)
        self.queries = torch.cat([self.queries, queries], dim=1)[:, -window:]

    def keep(self, indices: torch.Tensor) -> None:
        """Gather what survives: indices [KV heads, kept], int64."""
        self.positions = self.positions.gather(1, indices)
        indices = indices[..., None].expand(-1, -1, self.keys.shape[-1])
        self.keys = self.keys.gather(1, indices)
        self.values = self.values.gather(1, indices)
