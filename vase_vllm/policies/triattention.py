"""TriAttention's ranking (arXiv 2604.04921): by the average of a model's queries to come."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from vase_vllm.errors import EvictionError
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.policies.base import AttentionShape, Policy
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.query_statistics import HOST, QueryStatistics, read_statistics

REMEDY = "give a file that vase-vllm calibrate MODEL --output FILE has written for this model"


class TriAttentionPolicy(Policy):
    """Keeps the tokens that the model's average queries to come prefer (arXiv 2604.04921).

    Before RoPE the queries of a head are much alike, whatever the text and the position. Their
    mean, turned to the positions to come, says which keys they will prefer, and at which distances.
    In complex numbers, one for each pair of dimensions f that RoPE turns by ``w_f`` radians per
    token, a key ``k`` (before its rotation) at position p, an eviction at position P, and the
    means over queries of a calibration text:

    ``score = mean_d sum_f |E q_f| |k_f| cos(w_f (P + d - p) + arg(E q_f) - arg(k_f))
    + sum_f (E|q_f| - |E q_f|) |k_f|``, d = 1, 2, 4, ..., ``longest_offset``.

    The first sum is the dot product of the mean query with the key, as attention would have it at
    distance P + d - p. The second is for what the mean leaves out: the less concentrated a head's
    queries are, the more the length of the key counts. Each query head's scores are standardized
    over the candidates, and the largest over the query heads of a KV head is the priority.

    The cache has keys after their rotation, and the position of a key is not known. Neither is
    needed: the first sum is the product of the rotated key with *one* vector, the mean over d of
    the mean query turned to P + d, and a rotation leaves ``|k_f|`` as it is.

    This is the formula of the authors' code (github.com/WeianMao/triattention). What differs:

    * Each layer and KV head keeps tokens of its own, as all policies here do. That is the authors'
      option ``per_layer_perhead_pruning``. In their experiments a KV head keeps the same tokens in
      all layers, those of the largest mean over the layers.
    * The sinks and the window always stay, and prompts are evicted from unless ``prompt`` is
      ``keep``. The authors keep prompts, inside the budget, and neither sinks nor a window.
    * Ties go to the lower slot; the authors break them at random.
    * Dimensions that RoPE does not turn count as pairs of frequency 0.
    * A factor that RoPE scaling puts on queries and keys (YaRN's) is left out: it is the same in
      all scores, which are standardized.

    Operations for n candidates of one KV head of size D with G query heads: 3 G n D and n D / 2
    square roots.
    """

    name: ClassVar[str] = "triattention"

    statistics: str | None = None
    """File of the model's queries, which ``vase-vllm calibrate MODEL --output FILE`` writes."""
    longest_offset: int = Field(default=65536, ge=1)
    """The queries to come are those 1, 2, 4, ... tokens after the eviction, up to this many."""
    aggregation: Literal["max", "mean"] = "max"
    """What becomes of the standardized scores of the query heads that share a KV head."""

    def check(self, limits: EvictionLimits) -> None:
        """See :meth:`Policy.check`; reads the file."""
        self._read()

    def check_model(self, shape: AttentionShape) -> None:
        """See :meth:`Policy.check_model`."""
        if (measured := self._read().shape) != shape:
            raise EvictionError(
                f"statistics {self.statistics} are of another model ({measured}; this one has "
                f"{shape}): {REMEDY}"
            )

    def priority(self, candidates: Candidates) -> torch.Tensor:
        """See :meth:`Policy.priority`."""
        keys = candidates.keys
        statistics = self._read(keys.device)
        layers, kv_heads = (
            indices.to(keys.device, non_blocking=True)
            for indices in (candidates.layers, candidates.kv_heads)
        )
        mean = statistics.by_kv_head(statistics.mean)[layers, kv_heads]
        mean_length = statistics.by_kv_head(statistics.mean_length)[layers, kv_heads]
        query = mean_of_queries_to_come(
            mean,
            statistics.frequencies[layers],
            candidates.position,
            self.offsets.to(keys.device, non_blocking=True),
        )
        scores = key_scores(keys, query, mean_length - mean.abs(), statistics.pairs)
        scores = standardized(scores, candidates.limits.fixed)
        return scores.amax(dim=1) if self.aggregation == "max" else scores.mean(dim=1)

    @property
    def offsets(self) -> torch.Tensor:
        """Distances from the eviction to the queries to come: float64.

        >>> TriAttentionPolicy(longest_offset=20).offsets
        tensor([ 1.,  2.,  4.,  8., 16.], dtype=torch.float64)
        """
        return 2 ** torch.arange(self.longest_offset.bit_length(), dtype=torch.float64)

    def _read(self, device: torch.device = HOST) -> QueryStatistics:
        if self.statistics is None:
            raise EvictionError(f"statistics is missing, which {self.name} needs: {REMEDY}")
        try:
            return read_statistics(self.statistics, device)
        except EvictionError as error:
            raise EvictionError(f"statistics: {error}") from None


def mean_of_queries_to_come(
    mean: torch.Tensor, frequencies: torch.Tensor, position: int, offsets: torch.Tensor
) -> torch.Tensor:
    """The mean over the offsets of the mean query, turned to the position and the offset.

    Of two offsets a frequency of pi turns to opposite sides, and one of 0 does not turn:

    >>> mean = torch.tensor([[[1.0 + 0.0j, 2.0 + 1.0j]]])
    >>> frequencies = torch.tensor([[torch.pi, 0.0]], dtype=torch.float64)
    >>> query = mean_of_queries_to_come(mean, frequencies, 10, torch.tensor([1.0, 2.0]))
    >>> query.abs().round(decimals=4)
    tensor([[[0.0000, 2.2361]]])

    Args:
        mean: [H, G, F] complex64, the mean query of each query head before RoPE.
        frequencies: [H, F] float64, in radians per token.
        position: of the eviction.
        offsets: [m], distances from there.

    Returns:
        [H, G, F] complex64.
    """
    # Thousands of turns: single precision would leave three digits of the angle.
    angles = (position + offsets.to(frequencies)) * frequencies[..., None]  # [H, F, m]
    turn = torch.polar(torch.ones_like(angles), angles).mean(dim=-1)
    return (mean * turn[:, None]).to(mean.dtype)


def key_scores(
    keys: torch.Tensor, query: torch.Tensor, weights: torch.Tensor, pairs: torch.Tensor
) -> torch.Tensor:
    """Products of each key with a query, and the weighted sum of the lengths of its pairs.

    >>> keys = torch.tensor([[[3.0, 1.0], [4.0, 0.0]]])  # (3, 4) and (1, 0), in columns
    >>> query, weights = torch.tensor([[[2.0 + 1.0j]]]), torch.tensor([[[0.5]]])
    >>> key_scores(keys, query, weights, pairs=torch.tensor([[0], [1]]))
    tensor([[[12.5000,  2.5000]]])

    Args:
        keys: [H, D, n] fp32, after RoPE.
        query: [H, G, F] complex64, after RoPE.
        weights: [H, G, F] fp32.
        pairs: [2, F] int64, the dimensions of each pair.

    Returns:
        [H, G, n] fp32.
    """
    real, imaginary = keys[:, pairs[0]], keys[:, pairs[1]]
    return query.real @ real + query.imag @ imaginary + weights @ torch.hypot(real, imaginary)


def standardized(scores: torch.Tensor, fixed: int) -> torch.Tensor:
    """Less their mean and over their standard deviation, of those candidates that compete.

    The last two compete:

    >>> standardized(torch.tensor([[[9.0, 1.0, 3.0]]]), fixed=1)
    tensor([[[ 7., -1.,  1.]]])

    Args:
        scores: [H, G, n] fp32.
        fixed: first slots, whose tokens stay whatever their scores are.

    Returns:
        [H, G, n] fp32.
    """
    variance, mean = torch.var_mean(scores[..., fixed:], dim=-1, correction=0, keepdim=True)
    return (scores - mean) / variance.sqrt().clamp_min(1e-6)
