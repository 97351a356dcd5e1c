"""Statistics of queries that belong to no model, for the policy and for the oracle."""

import tempfile
from functools import cache
from pathlib import Path

import torch

from tests.oracle.policies import QueryMeans
from vase_vllm.policies.query_statistics import QueryStatistics, rotation_pairs

DIRECTORY = tempfile.TemporaryDirectory(prefix="query-statistics-")
LAYERS, KV_HEADS = 8, 12


@cache
def random_statistics(
    group: int,
    head_size: int,
    *,
    layers: int = LAYERS,
    kv_heads: int = KV_HEADS,
    theta: float = 10_000.0,
) -> QueryStatistics:
    """Means of all sizes, and lengths above them; RoPE turns all dimensions, half to half."""
    generator = torch.Generator().manual_seed(0)
    shape = (layers, kv_heads * group, head_size // 2)
    mean = torch.randn(shape, generator=generator, dtype=torch.complex64)
    return QueryStatistics(
        mean=mean,
        mean_length=mean.abs() * (1 + torch.rand(shape, generator=generator)),
        frequencies=rope_frequencies(head_size, theta).repeat(layers, 1),
        pairs=rotation_pairs(head_size, head_size, is_neox_style=True),
        num_kv_heads=kv_heads,
    )


def rope_frequencies(head_size: int, theta: float) -> torch.Tensor:
    """theta^(-2f / D), in the single precision that models have: [D / 2] float64."""
    return (1 / theta ** (torch.arange(0, head_size, 2) / head_size)).double()


@cache
def statistics_file(group: int, head_size: int, **shape: int | float) -> str:
    """The path of a file with :func:`random_statistics`."""
    name = "-".join(map(str, (group, head_size, *shape.values())))
    path = Path(DIRECTORY.name) / name
    random_statistics(group, head_size, **shape).save(path)
    return str(path)


def query_means(layer: int, kv_head: int, group: int, head_size: int, **shape) -> QueryMeans:
    """Those of one KV head in :func:`random_statistics`, as the oracle takes them."""
    statistics = random_statistics(group, head_size, **shape)
    heads = slice(kv_head * group, (kv_head + 1) * group)
    return QueryMeans(
        statistics.mean[layer, heads],
        statistics.mean_length[layer, heads],
        statistics.frequencies[layer],
    )
