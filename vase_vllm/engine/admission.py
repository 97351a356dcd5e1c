"""What running requests will probably hold, from the lengths of the answers that have finished.

Room kept for the longest that an answer may be is mostly kept for nothing: few requests say how
long theirs will be, and most end early. As in the Past-Future scheduler (Gong et al., arXiv
2507.10150), the last answers say how probable it is that one still runs some time from now, and
memory must do for every moment from now on. Under eviction no sequence grows past its bound.
"""

import numpy as np

NUM_REMEMBERED = 1024
NUM_NEEDED = 16
"""Answers longer than a request's own so far, without which nothing is predicted for it."""
NUM_MOMENTS = 32
"""Moments of the future at which memory is looked at."""
MARGIN = 2.0
"""Standard deviations that are kept free beside what is expected."""


class AnswerLengths:
    """Lengths of the last answers that finished, in tokens."""

    def __init__(self) -> None:
        self._lengths = np.zeros(NUM_REMEMBERED, dtype=np.int64)
        self._num_seen = 0
        self._num_longer: np.ndarray | None = None

    def add(self, num_tokens: int, cut_off: bool) -> None:
        """Remember an answer; one that was cut off would have been longer than any."""
        self._lengths[self._num_seen % NUM_REMEMBERED] = -1 if cut_off else num_tokens
        self._num_seen += 1
        self._num_longer = None

    def survival(self, so_far: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """Probability that answers go on.

        With L a remembered length: the share of ``L > so_far + ahead`` among ``L > so_far``; 1
        where too few are longer than ``so_far``.

        Args:
            so_far: [R] int64, tokens that each answer has.
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


def expected_peak(
    answer_lengths: AnswerLengths,
    num_prompt: np.ndarray,
    so_far: np.ndarray,
    most_slots: np.ndarray,
    num_state_blocks: np.ndarray,
    block_size: int,
) -> int:
    """Most blocks that sequences which decode side by side will hold at any moment from now on.

    A sequence that still runs ``t`` tokens from now holds the blocks of ``min(length + t, most)``
    slots and of its state, else none. Of their sum: the largest of mean and margin over ``t``.

    Args:
        num_prompt, so_far: [R] int64, tokens of each prompt and of its answer.
        most_slots: [R] int64, slots that each can come to need.
        num_state_blocks: [R] int64.
    """
    length = num_prompt + so_far
    horizon = max(int((most_slots - length).max()), 0)
    ahead = np.linspace(0, horizon, NUM_MOMENTS).astype(np.int64)
    slots = np.minimum(length[:, None] + ahead, most_slots[:, None])
    blocks = num_state_blocks[:, None] - (-slots // block_size)
    runs = answer_lengths.survival(so_far, ahead)
    mean = (runs * blocks).sum(axis=0)
    variance = (runs * (1 - runs) * blocks**2).sum(axis=0)
    return int(np.ceil((mean + MARGIN * np.sqrt(variance)).max()))
