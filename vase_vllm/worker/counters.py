"""Counts what one worker evicts."""

from dataclasses import dataclass

import numpy as np


@dataclass
class EvictionCounters:
    """What one worker has evicted since it started.

    Several builders count into it, each for its own layers; a sequence evicts from all of them.
    """

    num_layers: int
    # [sequences] tokens cached by each sequence of the latest step; summed only when asked for. It
    # may be vLLM's own memory, in which they stay until the next step.
    num_cached: np.ndarray | None = None
    # That evictions took since the last report. On a GPU nobody asks: it would be the launches'.
    seconds: float = 0.0
    _layer_evictions: int = 0
    _layer_tokens: int = 0

    def add(self, num_layers: int, num_tokens: int) -> None:
        """Count one sequence's eviction of ``num_tokens`` per KV head from ``num_layers``."""
        self._layer_evictions += num_layers
        self._layer_tokens += num_layers * num_tokens

    def take_microseconds(self) -> int:
        """How long the evictions took since the last call; 0 if there were none."""
        seconds, self.seconds = self.seconds, 0.0
        return round(seconds * 1e6)

    def as_dict(self) -> dict[str, int]:
        """Evictions of sequences, and tokens per layer and KV head: dropped so far, and cached.

        ``cached_tokens`` is that of the latest step, over all its sequences.
        """
        return {
            "evictions": self._layer_evictions // self.num_layers,
            "evicted_tokens": self._layer_tokens // self.num_layers,
            "cached_tokens": 0 if self.num_cached is None else int(self.num_cached.sum()),
        }
