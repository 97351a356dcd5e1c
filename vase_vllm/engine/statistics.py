"""What the scheduler knows of evictions, and how it reaches the API server's metrics.

When a sequence evicts follows from its position, so the scheduler counts without asking the
workers, while requests run, and also for those that are aborted or recomputed.
"""

from dataclasses import dataclass

from vllm.v1.metrics.stats import SchedulerStats

_PREFIX = "vase_vllm:"
_SENT = "vase_vllm"


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
        outstanding_blocks: that the running requests can still come to need, at most.
        admissions: requests that began to run, after a preemption too.
        deferrals_promised: steps in which the next waiting request stayed out of blocks that are
            free, because they are kept for the running requests.
        deferrals_full: steps in which too few blocks were free for it.
        preemptions_before, preemptions_after: of requests before and after their first eviction.
        preempted_tokens_before, preempted_tokens_after: that these had computed.
        eviction_microseconds: that evictions took of the step, where the host knows; see
            :mod:`vase_vllm.engine.eviction_time`.
    """

    evictions: int = 0
    evicted_tokens: int = 0
    released_blocks: int = 0
    held_tokens: int = 0
    logical_tokens: int = 0
    evicting_requests: int = 0
    outstanding_blocks: int = 0
    admissions: int = 0
    deferrals_promised: int = 0
    deferrals_full: int = 0
    preemptions_before: int = 0
    preemptions_after: int = 0
    preempted_tokens_before: int = 0
    preempted_tokens_after: int = 0
    eviction_microseconds: int = 0

    def count_preemption(self, num_computed_tokens: int, has_evicted: bool) -> None:
        """Count a request that is preempted, and what it has to compute again."""
        if has_evicted:
            self.preemptions_after += 1
            self.preempted_tokens_after += num_computed_tokens
        else:
            self.preemptions_before += 1
            self.preempted_tokens_before += num_computed_tokens

    def put_into(self, stats: SchedulerStats) -> None:
        """Send it with what vLLM's scheduler reports of a step.

        ``SchedulerStats`` has no room for a plugin's numbers. One of its fields takes any name and
        number, and is empty without a KV connector, which eviction does not support. Most numbers
        of most steps are 0, and left out.
        """
        sent = stats.num_kv_fetch_reqs_by_stage
        sent[_SENT] = 1
        for name, number in vars(self).items():
            if number:
                sent[_PREFIX + name] = number

    @classmethod
    def take_from(cls, stats: SchedulerStats) -> "EvictionStatistics | None":
        """Take it out again, before vLLM's own loggers see it; None where there is none."""
        sent = stats.num_kv_fetch_reqs_by_stage
        if sent.pop(_SENT, None) is None:
            return None
        names = [name for name in sent if name.startswith(_PREFIX)]
        return cls(**{name.removeprefix(_PREFIX): sent.pop(name) for name in names})
