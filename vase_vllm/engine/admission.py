"""What running requests will probably hold, from the lengths of the outputs that have finished.

Memory that is reserved for the longest possible output is mostly reserved for nothing: few requests
say how long their output will be, and most stop early. As in the Past-Future scheduler (Gong et
al., arXiv 2507.10150), the lengths of the last outputs give the probability that a request still
runs some time from now, and memory must suffice at every moment from now on. Here those that still
run count as well, as longer than they are. Under eviction no sequence grows past its bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from vllm.v1.request import Request

from vase_vllm.config import EvictionConfig

NUM_REMEMBERED = 1024
NUM_NEEDED = 16
"""Remembered outputs longer than a request's own so far that a prediction for it needs."""
NUM_MOMENTS = 32
"""Moments of the future at which memory is looked at: a grid, and as many ends of outputs."""
NUM_REPEATS = 16
"""How often an answer is given to the request that waits, before it is worked out again."""
SLACK = 8
"""Steps that an output may be late, which waits for a chunk of a prompt beside it."""
MARGIN = 2.0
"""Standard deviations that are reserved beside what is expected."""


class OutputLengths:
    """Lengths of the last outputs that ended by themselves or were cut off, in tokens.

    Outputs that were cut off, and those that still run, are longer than they are known to be. The
    product-limit estimator (Kaplan and Meier, JASA 53, 1958) takes them as that: without it the
    short outputs, which end first, would be all that is known of any.
    """

    def __init__(self) -> None:
        self._lengths = np.zeros(NUM_REMEMBERED, dtype=np.int64)
        self._is_cut_off = np.zeros(NUM_REMEMBERED, dtype=bool)
        self._num_seen = 0

    def add(self, num_tokens: int, cut_off: bool) -> None:
        """Remember an output; one that was ``cut_off`` would have been longer."""
        index = self._num_seen % NUM_REMEMBERED
        self._lengths[index], self._is_cut_off[index] = num_tokens, cut_off
        self._num_seen += 1

    def survival(self, so_far: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """Probability that running outputs go on.

        With ``d`` outputs that ended at length ``l`` and ``n`` that were observed to have ``l``
        tokens or more, running ones among them: the product of ``1 - d / n`` over the lengths
        ``l`` with ``so_far < l <= so_far + ahead``. It is 1 where too few remembered outputs are
        longer than ``so_far``.

        Args:
            so_far: [R] int64, tokens that each running output has.
            ahead: [K] int64, further tokens.

        Returns:
            [R, K].
        """
        lengths = np.sort(self._lengths[: self._num_seen])
        is_cut_off = self._is_cut_off[: self._num_seen]
        ends, num_ended = np.unique(
            self._lengths[: self._num_seen][~is_cut_off], return_counts=True
        )
        num_observed = _at_least(lengths, ends) + _at_least(np.sort(so_far), ends)
        # The logarithm of what is left after each length, and of all before the first.
        with np.errstate(divide="ignore"):
            steps = np.log1p(-num_ended / num_observed)
        left = np.concatenate([[0.0], np.cumsum(np.maximum(steps, _LOG_NONE))])
        now = left[np.searchsorted(ends, so_far, side="right")][:, None]
        then = left[np.searchsorted(ends, so_far[:, None] + ahead, side="right")]
        num_longer = _at_least(lengths, so_far + 1)[:, None]
        return np.where(num_longer < NUM_NEEDED, 1.0, np.exp(then - now))


_LOG_NONE = -50.0
"""In place of the logarithm of 0, which differences could not be taken of."""


def _at_least(lengths: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """How many of sorted lengths are as long as each bound."""
    return len(lengths) - np.searchsorted(lengths, bounds, side="left")


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


class AdmissionAnswer(NamedTuple):
    """What decides whether a waiting request is admitted, beside the blocks of its own tokens.

    Attributes:
        num_kept_free: blocks that must stay free beside those, for what it and the running requests
            can, or probably will, come to need.
        num_free: blocks that were free when it asked.
    """

    num_kept_free: int
    num_free: int


@dataclass
class Expectation:
    """What was expected last, for a request that asks in every step until it is admitted.

    While the same requests run, the answer hardly changes: they take blocks out of the pool as they
    have been expected to. It is worked out again when one comes or ends, and now and then.

    Attributes:
        request_id: who asked; None: it is for the running requests alone.
        num_blocks: the answer.
        num_left: how often it may still be given.
    """

    request_id: str | None = None
    num_blocks: int = 0
    num_left: int = 0

    def holds_for(self, request_id: str | None) -> bool:
        """Whether the answer may be given once more."""
        self.num_left -= 1
        return self.num_left >= 0 and self.request_id == request_id

    def set(self, request_id: str | None, num_blocks: int) -> None:
        """Take note of an answer."""
        self.request_id, self.num_blocks, self.num_left = request_id, num_blocks, NUM_REPEATS

    def admitted(self, request_id: str, num_blocks: int) -> None:
        """A request has begun to run, with so many blocks.

        If it is the one that asked last, what was expected of it and the others has come true as
        far as it goes, and is the answer for the running ones: :attr:`request_id` is None.
        """
        if self.request_id == request_id:
            self.set(None, max(self.num_blocks - num_blocks, 0))
        else:
            self.forget()

    def forget(self) -> None:
        """Other requests run."""
        self.num_left = 0


def expected_peak(
    output_lengths: OutputLengths,
    *,
    num_prompt: np.ndarray,
    so_far: np.ndarray,
    remaining: np.ndarray,
    first: np.ndarray,
    first_query: np.ndarray,
    num_complete: np.ndarray,
    block_size: int,
) -> int:
    """Most blocks that sequences which decode side by side will hold at any moment from now on.

    A sequence that still runs ``t`` tokens from now holds the blocks of ``length + t`` tokens, or
    all that it ever will if a query of it is kept by then; one that has finished, as it must after
    ``remaining`` tokens, holds none. The result is the largest, over ``t``, of the sum's mean and
    margin.

    Args:
        num_prompt, so_far: [R] int64, tokens of each prompt and of its output.
        remaining: [R] int64, tokens after which each output is cut off.
        first: [R] int64, position of each sequence's first eviction.
        first_query: [R] int64, the earliest position of each whose query is kept.
        num_complete: [R] int64, blocks of each from then on.
    """
    length = num_prompt + so_far
    ahead = _moments(np.minimum(remaining, first - length), remaining + SLACK)
    tokens = length[:, None] + np.minimum(ahead, remaining[:, None])
    blocks = np.where(
        tokens > first_query[:, None], num_complete[:, None], -(-tokens // block_size)
    )
    runs = output_lengths.survival(so_far, ahead) * (ahead <= remaining[:, None] + SLACK)
    mean = (runs * blocks).sum(axis=0)
    variance = (runs * (1 - runs) * blocks**2).sum(axis=0)
    return int(np.ceil((mean + MARGIN * np.sqrt(variance)).max()))


def _moments(growing: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Moments among which the sum is largest: on a grid, and just before outputs are cut off.

    Args:
        growing: [R] int64, for how many tokens each sequence holds more and more.
        ends: [R] int64, for how many it holds anything.

    Returns:
        [K] int64, K at most ``2 * NUM_MOMENTS``.
    """
    horizon = max(int(growing.max()), 0)
    ends = np.sort(np.clip(ends, 0, horizon))
    chosen = np.linspace(0, len(ends) - 1, NUM_MOMENTS).astype(np.int64)
    grid = np.linspace(0, horizon, NUM_MOMENTS).astype(np.int64)
    return np.unique(np.concatenate([grid, ends[chosen]]))
