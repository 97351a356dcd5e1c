"""What the fused eviction is compared with, all in plain PyTorch.

The authors' method works on a contiguous cache with one sequence length per batch, layer by layer:
[B, H, n, D]. B sequences, H KV heads, G query heads per KV head, W window, n tokens.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import avg_pool1d, normalize, scaled_dot_product_attention

from vase_vllm.kernels.parameters import EvictionParameters

Eviction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def window_attention(
    keys: torch.Tensor, queries: torch.Tensor, parameters: EvictionParameters
) -> torch.Tensor:
    """Smoothed mean attention of the window's queries to the candidates: [B, H, n - W].

    Args:
        keys: [B, H, n, D].
        queries: [B, H, G * W, D], query head major.
    """
    batch, num_heads, _, head_size = queries.shape
    candidates = keys[:, :, : -parameters.window]
    scale = head_size**-0.5 / parameters.temperature
    logits = torch.matmul(queries, candidates.transpose(2, 3)) * scale
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights = weights.view(batch * num_heads, -1, parameters.window, weights.shape[-1]).mean(2)
    pooled = avg_pool1d(weights, parameters.smoothing, 1, parameters.smoothing // 2)
    return pooled.mean(1).view(batch, num_heads, -1)


def keep_tokens(keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, window: int) -> None:
    """Gather the survivors and the window, and copy them to the front of the cache.

    Args:
        kept: [B, H, T - W] int64 indices of candidates.
    """
    for cache in (keys, values):
        index = kept[..., None].expand(-1, -1, -1, cache.shape[-1])
        compact = torch.cat([cache.gather(2, index), cache[:, :, -window:]], dim=2)
        cache[:, :, : compact.shape[2]].copy_(compact)


def authors_eviction(parameters: EvictionParameters) -> Eviction:
    """VaSE as its authors write it: topk, multinomial, gather, copy.

    ``torch.multinomial`` is written out as torch computes it, an exponential race, without its look
    at the weights, for which the host would wait: a CUDA graph can hold it then.
    """

    def evict(keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> None:
        scores = window_attention(keys, queries, parameters)
        ranges = values[:, :, : -parameters.window]
        ranges = (ranges.amax(-1) - ranges.amin(-1)).float()
        ranges[..., : parameters.sinks] = torch.inf
        protected = ranges.topk(parameters.protected, dim=-1).indices
        weights = scores.scatter(2, protected, 0.0).flatten(0, 1)
        num_drawn = parameters.budget - parameters.window - parameters.protected
        arrivals = torch.empty_like(weights).exponential_()
        drawn = (weights / arrivals).topk(num_drawn, dim=-1).indices.view(*scores.shape[:2], -1)
        kept = torch.cat([protected, drawn], dim=-1).sort(-1).values
        keep_tokens(keys, values, kept, parameters.window)

    return evict


def rkv_eviction(parameters: EvictionParameters, weight: float = 0.5) -> Eviction:
    """R-KV's rule: ``weight * a - (1 - weight) * softmax(mean cosine similarity)``, top-k.

    The mean over all keys of the cosine similarity is taken against the mean of the unit keys,
    which is the same number without the n x n matrix; R-KV's own threshold on it is left out.
    """

    def evict(keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> None:
        scores = window_attention(keys, queries, parameters)
        unit = normalize(keys[:, :, : -parameters.window].float(), dim=-1)
        similarity = torch.matmul(unit, unit.mean(2)[..., None]).squeeze(-1)
        scores = weight * scores - (1 - weight) * torch.softmax(similarity, dim=-1)
        kept = scores.topk(parameters.budget - parameters.window, dim=-1).indices.sort(-1).values
        keep_tokens(keys, values, kept, parameters.window)

    return evict


def decode_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Attention of one decode step of one layer.

    A stand-in for vLLM's: SDPA over a contiguous cache, where the G query heads of a KV head are
    the rows of one query, so that it reads K and V once.

    Args:
        queries: [B, H, G, D].
        keys: [B, H, n, D].
        values: [B, H, n, D].
    """
    scaled_dot_product_attention(queries, keys, values)
