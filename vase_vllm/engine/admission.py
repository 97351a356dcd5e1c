"""What running requests will probably hold, from the lengths of the outputs that have finished.

Memory that is reserved for the longest possible output is mostly reserved for nothing: few requests
say how long their output will be, and most stop early. As in the Past-Future scheduler (Gong et
al., arXiv 2507.10150), the lengths of the last outputs give the probability that a request still
runs some time from now, and memory must suffice at every moment from now on. Under eviction no
sequence grows past its bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from vllm.v1.request import Request

from vase_vllm.config import EvictionConfig

NUM_REMEMBERED = 1024
NUM_NEEDED = 16
"""Finished outputs longer than a request's own so far that a prediction for it needs."""
NUM_MOMENTS = 32
"""Moments of the future at which memory is looked at."""
MARGIN = 2.0
"""Standard deviations that are reserved beside what is expected."""


class OutputLengths:
    """Lengths of the last outputs that finished, in tokens."""

    def __init__(self) -> None:
        self._lengths = np.zeros(NUM_REMEMBERED, dtype=np.int64)
        self._num_seen = 0
        self._num_longer: np.ndarray | None = None

    def add(self, num_tokens: int, cut_off: bool) -> None:
        """Remember an output; one that was cut off counts as longer than any other."""
        self._lengths[self._num_seen % NUM_REMEMBERED] = -1 if cut_off else num_tokens
        self._num_seen += 1
        self._num_longer = None

    def survival(self, so_far: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """Probability that outputs go on.

        With L a remembered length: the share of ``L > so_far + ahead`` among ``L > so_far``; 1
        where too few are longer than ``so_far``.

        Args:
            so_far: [R] int64, tokens that each output has.
            ahead: [K] int64, further tokens.

        Returns:
            [R, K].
        """
        if self._num_longer is None:
            lengths = self._lengths[: self._num_seen]
            ended = np.bincount(lengths[lengths >= 0], minlength=1)
            self._num_longer = len(lengths) - np.cumsum(ended)
        last = len(self._num_longer) - 1
        longer_now = self._num_longer[np.minimum(so_far, last)][:, None]
        longer_then = self._num_longer[np.minimum(so_far[:, None] + ahead, last)]
        return np.where(longer_now < NUM_NEEDED, 1.0, longer_then / np.maximum(longer_now, 1))


@dataclass(frozen=True)
class AdmissionContext:
    """What block managers know of their scheduler; all of an engine's managers share one.

    Attributes:
        requests: the scheduler's live table, request id to request.
        config: of the server.
        max_model_len: tokens of the longest sequence.
        output_lengths: of the requests that have finished.
    """

    requests: Mapping[str, Request]
    config: EvictionConfig
    max_model_len: int
    output_lengths: OutputLengths = field(default_factory=OutputLengths)

    def longest(self, request: Request) -> int:
        """Tokens that a sequence can come to have, prompt and output."""
        return min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)


def expected_peak(
    output_lengths: OutputLengths,
    num_prompt: np.ndarray,
    so_far: np.ndarray,
    most_slots: np.ndarray,
    num_state_blocks: np.ndarray,
    block_size: int,
) -> int:
    """Most blocks that sequences which decode side by side will hold at any moment from now on.

    A sequence that still runs ``t`` tokens from now holds the blocks of ``min(length + t, most)``
    slots and its state blocks; one that has finished holds none. The result is the largest, over
    ``t``, of the sum's mean and margin.

    Args:
        num_prompt, so_far: [R] int64, tokens of each prompt and of its output.
        most_slots: [R] int64, slots that each can come to need.
        num_state_blocks: [R] int64.
    """
    length = num_prompt + so_far
    horizon = max(int((most_slots - length).max()), 0)
    ahead = np.linspace(0, horizon, NUM_MOMENTS).astype(np.int64)
    slots = np.minimum(length[:, None] + ahead, most_slots[:, None])
    blocks = num_state_blocks[:, None] - (-slots // block_size)
    runs = output_lengths.survival(so_far, ahead)
    mean = (runs * blocks).sum(axis=0)
    variance = (runs * (1 - runs) * blocks**2).sum(axis=0)
    return int(np.ceil((mean + MARGIN * np.sqrt(variance)).max()))
