"""Warns once of each request whose priorities are NaN, such as of one whose activations overflow.

NaN ranks lowest and every sequence keeps as many tokens as it should, so nothing else would tell.
"""

from collections import deque

import numpy as np
import torch
from cachetools import LRUCache
from vllm.logger import init_logger

logger = init_logger("vllm.vase_vllm")

NOT_NAN = -1
"""In place of a row's key, which is never negative, where no priority is NaN."""


class NaNWarnings:
    """Requests of one worker that have been warned of, and evictions that a device still runs."""

    def __init__(self, policy_name: str) -> None:
        self._policy_name = policy_name
        # A request's content key and first eviction.
        self._warned: LRUCache[tuple[int, int], None] = LRUCache(maxsize=1024)
        self._launched: deque[tuple[torch.Tensor, np.ndarray, torch.cuda.Event | None]] = deque()

    def warn(self, key: int, first: int) -> None:
        """Warn of a request, the first time.

        Args:
            key: hash of its content, from its block-table row.
            first: position of its first eviction.
        """
        if (key, first) in self._warned:
            return
        self._warned[key, first] = None
        logger.warning(
            "KV eviction: a request's priorities are NaN (content key %d, first eviction at "
            "position %d): its activations overflow, or the policy %s fails. It keeps as many "
            "tokens as any other request, and other requests are not affected.",
            key,
            first,
            self._policy_name,
        )

    def watch(self, nan_keys: torch.Tensor, first: np.ndarray) -> None:
        """Look at what a launched eviction finds, once it has run; nobody waits for it.

        Args:
            nan_keys: [due] int32, which the launch writes: a row's key, or ``NOT_NAN``.
            first: [due] int64 on the host, of the same rows.
        """
        event = None
        if nan_keys.is_cuda:
            nan_keys = nan_keys.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._launched.append((nan_keys, first, event))

    def poll(self) -> None:
        """Warn of what watched evictions have found, as far as they have run."""
        while self._launched:
            nan_keys, first, event = self._launched[0]
            if event is not None and not event.query():
                return
            self._launched.popleft()
            for index in np.flatnonzero(nan_keys.numpy() != NOT_NAN):
                self.warn(int(nan_keys[index]), int(first[index]))
