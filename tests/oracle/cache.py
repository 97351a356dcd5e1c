"""The contiguous cache of one layer."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class LayerCache:
    """Keys, values and positions that one layer holds, in order of position in every KV head.

    Attributes:
        keys: [KV heads, length, D], float32, after RoPE.
        values: [KV heads, length, D], float32.
        positions: [KV heads, length], int64, true positions.
        queries: [query heads, at most W, D], float32, after RoPE, of the newest positions.
        received: [KV heads, length], float32, attention received up to the last eviction, summed
            over the queries that `attend` has told of, and over query heads.
        newest_attention: [KV heads, at most W, length], float32, that of the newest queries since.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    queries: torch.Tensor
    received: torch.Tensor
    newest_attention: torch.Tensor

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
            received=torch.empty(kv_heads, 0),
            newest_attention=torch.empty(kv_heads, 0, 0),
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
        self.received = F.pad(self.received, (0, keys.shape[1]))
        self.newest_attention = F.pad(self.newest_attention, (0, keys.shape[1]))

    def attend(self, attention: torch.Tensor, window: int) -> None:
        """Take note of the attention that the newest queries have paid.

        Args:
            attention: [query heads, m, length], float32.
            window: W, how many of the newest queries to remember.
        """
        per_kv_head = attention.unflatten(0, (len(self.keys), -1)).sum(dim=1)
        self.newest_attention = torch.cat([self.newest_attention, per_kv_head], dim=1)[:, -window:]

    def received_so_far(self) -> torch.Tensor:
        """Attention that each token has received until now: [KV heads, length], float32."""
        return self.received + self.newest_attention.sum(dim=1)

    def keep(self, indices: torch.Tensor) -> None:
        """Gather what survives: indices [KV heads, kept], int64."""
        self.positions = self.positions.gather(1, indices)
        self.received = self.received_so_far().gather(1, indices)
        self.newest_attention = torch.empty(len(indices), 0, indices.shape[1])
        indices = indices[..., None].expand(-1, -1, self.keys.shape[-1])
        self.keys = self.keys.gather(1, indices)
        self.values = self.values.gather(1, indices)
