"""What the scheduler knows of evictions, and how it reaches the API server's metrics.

When a sequence evicts follows from its position, so the scheduler counts without asking the
workers, while requests run, and also for those that are aborted or recomputed.
"""

from dataclasses import dataclass, fields

from vllm.v1.metrics.stats import SchedulerStats

_PREFIX = "vase_vllm:"


@dataclass
class EvictionStatistics:
    """What one engine reports of one step.

    Attributes:
        evictions: of sequences since the last report, those of a recomputed output included.
        evicted_tokens: by them, per layer and KV head.
        released_blocks: that prompts longer than the bound gave back at their first eviction.
        held_tokens: in the KV cache of the running requests, per layer and KV head.
        logical_tokens: that the running requests have computed, evicted or not.
        evicting_requests: running requests that have evicted.
    """

    evictions: int = 0
    evicted_tokens: int = 0
    released_blocks: int = 0
    held_tokens: int = 0
    logical_tokens: int = 0
    evicting_requests: int = 0

    def put_into(self, stats: SchedulerStats) -> None:
        """Send it with what vLLM's scheduler reports of a step.

        ``SchedulerStats`` has no room for a plugin's numbers. One of its fields takes any name and
        number, and is empty without a KV connector, which eviction does not support.
        """
        for field in fields(self):
            name = _PREFIX + field.name
            stats.num_kv_fetch_reqs_by_stage[name] = getattr(self, field.name)

    @classmethod
    def take_from(cls, stats: SchedulerStats) -> "EvictionStatistics | None":
        """Take it out again, before vLLM's own loggers see it; None where there is none."""
        sent = stats.num_kv_fetch_reqs_by_stage
        names = [field.name for field in fields(cls)]
        if _PREFIX + names[0] not in sent:
            return None
        return cls(**{name: sent.pop(_PREFIX + name) for name in names})
