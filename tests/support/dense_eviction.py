"""Evictions over plain tensors, as the product sees them and as the oracle does."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.oracle.selection import Candidates as OracleCandidates
from tests.oracle.selection import attention_scores
from vase_vllm.config import EvictionConfig
from vase_vllm.policies.candidates import Candidates, DenseTokens
from vase_vllm.policies.draws import Draws


@dataclass(frozen=True)
class DenseEviction:
    """The first eviction of one layer of a sequence, whose slots lie in order of position.

    Attributes:
        config: of any policy.
        queries: [H, G, W, D] fp32.
        keys, values: [H, n, D] fp32.
        window_keys, window_values: [H, W, D] fp32.
    """

    config: EvictionConfig
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    window_keys: torch.Tensor
    window_values: torch.Tensor

    @classmethod
    def random(
        cls,
        settings: dict[str, Any],
        num_candidates: int,
        *,
        num_heads: int = 2,
        group: int = 2,
        head_size: int = 16,
        seed: int = 0,
        num_distinct: int | None = None,
    ) -> "DenseEviction":
        """Normal numbers; of the candidates only ``num_distinct`` differ, and the others repeat."""
        config = EvictionConfig.parse(settings)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.arange(num_candidates) % (num_distinct or num_candidates)
        queries = torch.randn(num_heads, group, config.window, head_size, generator=generator)
        keys, values = torch.randn(2, num_heads, num_candidates, head_size, generator=generator)
        of_window = torch.randn(2, num_heads, config.window, head_size, generator=generator)
        return cls(config, queries, keys[:, rows], values[:, rows], *of_window)

    def repeated(self, num_heads: int) -> "DenseEviction":
        """The first KV head many times over: heads that differ in their draws only."""
        return self._with_each(lambda tensor: tensor[:1].expand(num_heads, *tensor.shape[1:]))

    def permuted(self, order: torch.Tensor) -> "DenseEviction":
        """The candidates in another order: [n] int64."""
        return replace(self, keys=self.keys[:, order], values=self.values[:, order])

    def head(self, head: int) -> "DenseEviction":
        """One KV head by itself."""
        return self._with_each(lambda tensor: tensor[head : head + 1])

    def _with_each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "DenseEviction":
        tensors = (self.queries, self.keys, self.values, self.window_keys, self.window_values)
        return DenseEviction(self.config, *map(function, tensors))

    def candidates(
        self, *, key: int = 1, eviction_index: int = 0, layer: int = 0, first_head: int = 0
    ) -> Candidates:
        """As a policy of the product sees them.

        Args:
            key: of the request's content.
            first_head: index of the first of these KV heads in the whole model.
        """
        num_heads, num_candidates, head_size = self.keys.shape
        limits = self.config.limits
        draws = Draws(
            limits,
            key,
            eviction_index,
            num_candidates,
            [layer],
            torch.arange(first_head, first_head + num_heads),
        )
        return Candidates(
            num=num_candidates,
            queries=self.queries.transpose(1, 2).flatten(1, 2),
            tokens=DenseTokens(self.keys, self.values, self.window_keys, self.window_values),
            scale=head_size**-0.5,
            limits=limits,
            first=num_candidates + limits.window,
            eviction_index=eviction_index,
            draws=draws.of_layers([layer]),
        )

    def priority(self, **eviction: int) -> torch.Tensor:
        """Of each candidate, by the product: [H, n]; for the arguments see :meth:`candidates`."""
        return self.config.policy.priority(self.candidates(**eviction))

    def kept(self, **eviction: int) -> list[tuple[int, ...]]:
        """Candidates of each KV head that survive by the product's priority, ascending."""
        limits = self.config.limits
        priority = self.priority(**eviction)
        priority[:, : limits.fixed] = torch.inf
        order = priority.sort(dim=-1, descending=True, stable=True).indices
        survivors = order[:, : limits.budget - limits.window].sort(dim=-1).values
        return list(map(tuple, survivors.tolist()))

    def oracle(
        self,
        head: int,
        *,
        protected: int = 0,
        smoothing: int = 1,
        temperature: float = 1.0,
    ) -> OracleCandidates:
        """One KV head's, as the oracle's selectors see them; all of them have their own ranges."""
        limits = self.config.limits
        num_candidates = self.keys.shape[1]
        return OracleCandidates(
            step=num_candidates + limits.window,
            layer=0,
            kv_head=head,
            positions=torch.arange(num_candidates),
            scores=attention_scores(
                self.queries[head], self.keys[head], smoothing=smoothing, temperature=temperature
            ),
            ranges=torch.full((num_candidates,), torch.nan),
            protected=protected,
            keep=limits.budget - limits.window,
            sinks=limits.fixed,
            eviction_index=0,
            keys=self.keys[head],
            values=self.values[head],
            queries=self.queries[head],
            window_keys=self.window_keys[head],
            window_values=self.window_values[head],
            received=self._received(head),
        )

    def _received(self, head: int) -> torch.Tensor:
        """Attention that one KV head's candidates have received from the window: [n]."""
        window, (num_candidates, head_size) = self.config.window, self.keys.shape[1:]
        keys = torch.cat([self.keys[head], self.window_keys[head]])
        received = torch.zeros(num_candidates)
        for position in range(num_candidates, num_candidates + window):
            for query in self.queries[head, :, position % window]:
                logits = keys[: position + 1] @ query / head_size**0.5
                received += logits.softmax(dim=0)[:num_candidates]
        return received
