"""Random numbers of one eviction: a pure function of the request, the layer, the head, the slot.

The counter of the generator is (slot, eviction index, layer * 65536 + KV head, content key):
nothing in it depends on the batch, the rank, or the row that the request happens to have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.kernels.philox import uniform
from vase_vllm.kernels.torch_eviction import sampling_noise

_DRAWS_TOGETHER = 1 << 15
"""Noise drawn at once: int64 numbers that still fit a processor's cache."""
_RANDOM_PROTECTION = 1 << 63
_PROJECTION = 1 << 62
"""Bits that these draws flip in the seed, so that they are independent of the Gumbel noise."""


@dataclass
class Draws:
    """Draws of one eviction of one sequence, over layers.

    Attributes:
        limits: of the eviction; only the seed is read.
        key: hash of the request's content.
        eviction_index: evictions that the sequence has had before.
        num_candidates: n.
        layers: indices of the layers that evict together, in the whole model.
        kv_heads: [H] int64, indices of this rank's KV heads in the whole model.
        device: where the numbers are drawn.
    """

    limits: EvictionLimits
    key: int
    eviction_index: int
    num_candidates: int
    layers: list[int]
    kv_heads: torch.Tensor
    device: torch.device | str = "cpu"
    _gumbel: dict[int, torch.Tensor] = field(default_factory=dict)

    def of_layers(self, layers: Sequence[int]) -> "LayerDraws":
        """The draws of some of ``layers``, one after the other."""
        return LayerDraws(self, tuple(layers))

    def gumbel(self, layer: int) -> torch.Tensor:
        """Gumbel noise of one layer, [H, n] fp32.

        A draw is some hundred small operations, so layers draw together while their noise is small.
        """
        if layer not in self._gumbel:
            num_heads = len(self.kv_heads)
            num_together = max(1, _DRAWS_TOGETHER // (num_heads * self.num_candidates))
            start = self.layers.index(layer)
            together = self.layers[start : start + num_together]
            # The counter of layer l and head h is that of layer 0 and head l * 65536 + h.
            heads = self.counters(together).flatten()
            noise = sampling_noise(
                self.limits.seed, self.num_candidates, self.eviction_index, 0, heads, self.key
            )
            self._gumbel = dict(zip(together, noise.split(num_heads), strict=True))
        return self._gumbel[layer]

    def counters(self, layers: Sequence[int]) -> torch.Tensor:
        """What tells apart the KV heads of the whole model: [layers, H] int64, on the device."""
        on_host = torch.tensor(layers)[:, None] * 65536 + self.kv_heads
        return on_host.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class LayerDraws:
    """Draws of layers that are ranked together: H is the number of their KV heads in all."""

    eviction: Draws
    layers: tuple[int, ...]

    def gumbel(self) -> torch.Tensor:
        """Standard Gumbel noise, [H, n] fp32: ``log a + noise`` draws in proportion to ``a``."""
        return torch.cat([self.eviction.gumbel(layer) for layer in self.layers])

    def uniform(self) -> torch.Tensor:
        """Uniform numbers, [H, n] fp32 in (0, 1), independent of :meth:`gumbel`."""
        of = self.eviction
        heads = of.counters(self.layers).flatten()[:, None]
        slots = torch.arange(of.num_candidates, device=of.device)[None]
        return self._uniform(_RANDOM_PROTECTION, slots, of.eviction_index, heads)

    def gaussian(self, rows: int, columns: int, anew: bool) -> torch.Tensor:
        """Matrices of standard normal numbers, the same for all KV heads of a layer.

        Args:
            rows, columns: of each matrix.
            anew: draw others at every eviction, instead of the same for the whole sequence.

        Returns:
            [H, rows, columns] fp32.
        """
        of = self.eviction
        cells = torch.arange(2 * rows * columns, device=of.device)[None]
        index = 1 + of.eviction_index if anew else 0
        on_host = torch.tensor(self.layers)[:, None] * 65536
        layers = on_host.to(of.device, non_blocking=True)
        radius, angle = self._uniform(_PROJECTION, cells, index, layers).chunk(2, dim=-1)
        # Box and Muller, "A note on the generation of random normal deviates" (1958).
        normal = torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)
        return normal.view(-1, rows, columns).repeat_interleave(len(of.kv_heads), dim=0)

    def _uniform(self, stream: int, c0: torch.Tensor, index: int, c2: torch.Tensor) -> torch.Tensor:
        of = self.eviction
        c1, c3 = (torch.full((), number, device=of.device) for number in (index, of.key))
        return uniform(of.limits.seed ^ stream, c0, c1, c2, c3)
