"""What running requests will probably come to hold, from the answers of those that have finished.

Room kept for the longest that an answer may be is mostly kept for nothing: few requests say how
long theirs will be, and most end early. The lengths of the last answers say more, as in the
Past-Future scheduler (Gong et al., ASPLOS 2025), and here no sequence grows past its bound.
"""

import numpy as np

NUM_REMEMBERED = 1024
NUM_NEEDED = 16
"""Answers longer than a request's own so far, without which nothing is predicted for it."""
MARGIN = 2.0
"""Standard deviations of the sum over all requests that are kept free beside its mean."""


class AnswerLengths:
    """Lengths of the last answers that finished, in tokens."""

    def __init__(self) -> None:
        self._lengths = np.zeros(NUM_REMEMBERED)
        self._num_seen = 0
        self._is_sorted = True

    def add(self, num_tokens: float) -> None:
        """Remember an answer; infinity for one that was cut off, which would have been longer."""
        self._lengths[self._num_seen % NUM_REMEMBERED] = num_tokens
        self._num_seen += 1
        self._is_sorted = False

    def expect(self, so_far: np.ndarray, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How long answers become that are ``so_far`` long and count for at most ``most``.

        With L a remembered length: mean and variance of ``min(L, most)`` over those ``L > so_far``.
        Where too few are longer it is ``most``, without a variance.

        Args:
            so_far, most: [R] tokens.

        Returns:
            Mean and variance, each [R].
        """
        if not self._is_sorted:
            self._sorted = np.sort(self._lengths[: min(self._num_seen, NUM_REMEMBERED)])
            finite = np.where(np.isinf(self._sorted), 0.0, self._sorted)
            self._sums = np.concatenate([[0.0], np.cumsum(finite)])
            self._squares = np.concatenate([[0.0], np.cumsum(finite**2)])
            self._is_sorted = True
        if self._num_seen < NUM_NEEDED:
            return most.astype(float), np.zeros(len(most))
        # Remembered lengths from ``low`` on are longer; from ``high`` on they count for ``most``.
        low = np.searchsorted(self._sorted, so_far, side="right")
        high = np.maximum(np.searchsorted(self._sorted, most, side="left"), low)
        num_longer = len(self._sorted) - low
        num = np.maximum(num_longer, 1)
        num_most = len(self._sorted) - high
        mean = (self._sums[high] - self._sums[low] + num_most * most) / num
        square = (self._squares[high] - self._squares[low] + num_most * most**2) / num
        known = num_longer >= NUM_NEEDED
        variance = np.maximum(square - mean**2, 0.0)
        return np.where(known, mean, most), np.where(known, variance, 0.0)
