"""vLLM's schedulers, with evictions falling between two steps."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vase_vllm.blocks import EvictionManager


class _EvictionMixin(Scheduler):
    """Binds the block managers to the requests and bounds replayed chunks.

    A preempted sequence reads its prompt densely again, then computes its output again in chunks
    that end where its evictions fall. It so goes through the same cache states as the first time,
    and its continuation does not depend on whether, or when, it was preempted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = [
            manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, EvictionManager)
        ]
        for manager in managers:
            manager.requests = self.requests
        # All groups share one schedule: any manager can answer for a request.
        self._manager = managers[0]

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM's hook on the end of a chunk, called for every request that is scheduled."""
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        if num_new_tokens <= 1:
            return num_new_tokens
        first = self._manager.first_eviction(request.request_id)
        schedule = self._manager.kv_cache_spec.schedule
        return min(num_new_tokens, schedule.tokens_until_eviction(num_computed_tokens, first))


class EvictionScheduler(_EvictionMixin):
    """For engines without async scheduling."""


class EvictionAsyncScheduler(_EvictionMixin, AsyncScheduler):
    """For engines with async scheduling, vLLM's default."""
