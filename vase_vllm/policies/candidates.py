"""The candidates of one eviction, as a policy sees them.

A policy ranks KV head by KV head, so that heads of several layers can be ranked at once.

Shapes: H KV heads, G query heads per KV head, W window, n candidates, D head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.kernels.torch_eviction import attention_scores
from vase_vllm.policies.draws import LayerDraws


class TokenSource(Protocol):
    """Reads the candidates from wherever they lie, in slot order."""

    def keys(self) -> torch.Tensor:
        """[H, D, n] fp32, after RoPE."""

    def values(self) -> Iterator[torch.Tensor]:
        """[H, m, D] of the cache's dtype, part by part; the parts make up the n candidates."""

    def window_keys(self) -> torch.Tensor:
        """[H, W, D] of the cache's dtype, after RoPE, of the newest tokens, which stay."""

    def window_values(self) -> torch.Tensor:
        """[H, W, D] of the cache's dtype, likewise."""


@dataclass(frozen=True)
class DenseTokens:
    """Candidates that lie in plain tensors, as a test of a policy has them.

    Attributes:
        dense_keys, dense_values: [H, n, D].
        dense_window_keys, dense_window_values: [H, W, D], for policies that read them.
    """

    dense_keys: torch.Tensor
    dense_values: torch.Tensor
    dense_window_keys: torch.Tensor | None = None
    dense_window_values: torch.Tensor | None = None

    def keys(self) -> torch.Tensor:
        """See :class:`TokenSource`."""
        return self.dense_keys.float().transpose(-1, -2)

    def values(self) -> Iterator[torch.Tensor]:
        """See :class:`TokenSource`."""
        yield self.dense_values

    def window_keys(self) -> torch.Tensor:
        """See :class:`TokenSource`."""
        if self.dense_window_keys is None:
            raise ValueError("the policy reads the window's keys: give dense_window_keys")
        return self.dense_window_keys

    def window_values(self) -> torch.Tensor:
        """See :class:`TokenSource`."""
        if self.dense_window_values is None:
            raise ValueError("the policy reads the window's values: give dense_window_values")
        return self.dense_window_values


@dataclass(frozen=True)
class Candidates:
    """All tokens that an eviction may drop, in the KV heads of one layer or of several.

    They are those older than the window, and come in slot order, which is the order of position
    only until the first eviction; all KV heads agree on the number of candidates, not on which
    tokens they are.

    One KV head with one query head, window 1 and four candidates of head size 1:

    >>> from vase_vllm.policies.draws import Draws
    >>> limits = EvictionLimits(budget=3, window=1, sinks=1)
    >>> heads = torch.tensor([0])
    >>> draws = Draws(
    ...     limits, key=7, eviction_index=0, num_candidates=4, layers=[0], kv_heads=heads
    ... )
    >>> tokens = torch.tensor([[[0.0], [1.0], [3.0], [2.0]]])
    >>> candidates = Candidates(
    ...     num=4,
    ...     queries=torch.ones(1, 1, 1),
    ...     tokens=DenseTokens(dense_keys=tokens, dense_values=-tokens),
    ...     scale=1.0,
    ...     limits=limits,
    ...     first=5,
    ...     eviction_index=0,
    ...     draws=draws.of_layers([0]),
    ... )
    >>> candidates.attention()
    tensor([[0.0321, 0.0871, 0.6439, 0.2369]])

    A policy returns a number for each candidate; ``budget - window = 2`` survive:

    >>> from vase_vllm.policies.snapkv import SnapKVPolicy
    >>> SnapKVPolicy(smoothing=1).priority(candidates)
    tensor([[0.0321, 0.0871, 0.6439, 0.2369]])
    >>> from vase_vllm.policies.streaming import StreamingPolicy
    >>> StreamingPolicy().priority(candidates)
    tensor([[0., 1., 2., 3.]], dtype=torch.float64)

    Attributes:
        num: n.
        queries: [H, W * G, D] fp32, of the window, window-major, after RoPE.
        tokens: reads keys and values when the policy asks for them.
        scale: factor that attention puts on its logits, usually ``1 / sqrt(D)``.
        limits: budget, window, sinks and seed.
        first: position of the sequence's first eviction.
        eviction_index: evictions that the sequence has had before.
        draws: random numbers, keyed by request, layer, head and eviction.
        dtype: of the cache.
    """

    num: int
    queries: torch.Tensor
    tokens: TokenSource
    scale: float
    limits: EvictionLimits
    first: int
    eviction_index: int
    draws: LayerDraws
    dtype: torch.dtype = torch.float32

    @property
    def kv_heads(self) -> torch.Tensor:
        """[H] int64, on the host: the KV head of each row, by its index in the whole model."""
        return self.draws.eviction.kv_heads.repeat(len(self.draws.layers))

    @property
    def layers(self) -> torch.Tensor:
        """[H] int64, on the host: the layer of each row, by its index in the whole model."""
        return torch.tensor(self.draws.layers).repeat_interleave(len(self.draws.eviction.kv_heads))

    @property
    def position(self) -> int:
        """Position of the query that comes next, which is the first to miss what is evicted."""
        return self.first + self.eviction_index * self.limits.window

    @cached_property
    def keys(self) -> torch.Tensor:
        """[H, D, n] fp32, after RoPE."""
        return self.tokens.keys()

    @cached_property
    def values(self) -> torch.Tensor:
        """[H, n, D] fp32."""
        return torch.cat([part.float() for part in self.tokens.values()], dim=1)

    @cached_property
    def window_keys(self) -> torch.Tensor:
        """[H, D, W] fp32, of the window in order of position, after RoPE."""
        return self.tokens.window_keys().float().transpose(-1, -2)

    @cached_property
    def window_values(self) -> torch.Tensor:
        """[H, W, D] fp32, of the window in order of position."""
        return self.tokens.window_values().float()

    def of_values(self, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``function`` of each token's value, without keeping all the values: [H, n] fp32.

        Args:
            function: [H, m, D] to [H, m], for any m.
        """
        return torch.cat([function(part).float() for part in self.tokens.values()], dim=1)

    def attention(self, smoothing: int = 1, temperature: float = 1.0) -> torch.Tensor:
        """Mean attention that the window's queries pay to each candidate: [H, n] fp32.

        Args:
            smoothing: odd width of the average pooling over slots; 1 is off.
            temperature: divides the logits before the softmax over the candidates.
        """
        with _exact_products(self.dtype, self.queries.device):
            return attention_scores(self.queries, self.keys, self.scale / temperature, smoothing)


@contextmanager
def _exact_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Run fp32 matrix products of bf16 numbers on the processor's bf16 units.

    A product of two bf16 numbers is exact in fp32, and oneDNN adds up in fp32: the result is that
    of the fp32 units, in half the time.
    """
    if dtype != torch.bfloat16 or device.type != "cpu":
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
