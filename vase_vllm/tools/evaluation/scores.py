"""What one run of a model says of one sequence, and how far two runs of it are apart."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SMALLEST_REST = 1e-6
"""The probability of all other tokens is 1 less a sum of float32: below this it is rounding."""


@dataclass(frozen=True)
class Scores:
    """The most probable tokens at each position of a sequence of n tokens.

    Row i is about token i + 1, which is predicted at position i.

    Attributes:
        token_ids: [n - 1, 1 + k] int32; the true token, then the k most probable ones.
        logprobs: [n - 1, 1 + k] float32; their log-probabilities.
        ranks: [n - 1] int32; rank of the true token, 1 is the most probable.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int32]

    def __getitem__(self, rows: slice) -> "Scores":
        return Scores(self.token_ids[rows], self.logprobs[rows], self.ranks[rows])

    @property
    def nll(self) -> Floats:
        """Negative log-likelihood of the true tokens, in nats: [n - 1]."""
        return -self.logprobs[:, 0].astype(np.float64)

    @property
    def top_tokens(self) -> NDArray[np.int32]:
        """The most probable tokens: [n - 1]; needs k >= 1."""
        return self.token_ids[:, 1]


def divergence(full: Scores, evicted: Scores) -> Floats:
    """A lower bound of KL(full || evicted) at each position, in nats: [n - 1].

    The distributions are coarsened to the tokens that both runs report and one event for all
    others. Coarsening never raises a Kullback-Leibler divergence (data processing inequality).
    """
    return np.array(
        [
            _coarse_divergence(full.token_ids[i], full.logprobs[i], *row)
            for i, row in enumerate(zip(evicted.token_ids, evicted.logprobs, strict=True))
        ]
    )


def _coarse_divergence(
    full_ids: NDArray[np.int32],
    full_logprobs: NDArray[np.float32],
    evicted_ids: NDArray[np.int32],
    evicted_logprobs: NDArray[np.float32],
) -> float:
    """The bound at one position. np.intersect1d takes a token once that is listed twice."""
    _, ours, theirs = np.intersect1d(full_ids, evicted_ids, return_indices=True)
    log_p = full_logprobs[ours].astype(np.float64)
    log_q = evicted_logprobs[theirs].astype(np.float64)
    p, q = np.exp(log_p), np.exp(log_q)
    rest_p, rest_q = (max(1 - float(x.sum()), SMALLEST_REST) for x in (p, q))
    return float((p * (log_p - log_q)).sum() + rest_p * np.log(rest_p / rest_q))
