"""Prometheus metrics of eviction, at ``/metrics`` beside vLLM's own."""

from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats
from vllm.v1.metrics.utils import create_metric_per_engine

from vase_vllm.config import EvictionConfig
from vase_vllm.engine.statistics import EvictionStatistics

LABELS = ("model_name", "engine")


class LabelledCounter(NamedTuple):
    """A counter with a label of its own.

    Attributes:
        documentation: of the metric.
        label: its name.
        fields: each of its values to the field of :class:`EvictionStatistics` that is counted.
    """

    documentation: str
    label: str
    fields: dict[str, str]


COUNTERS = {
    "evictions": "Evictions of sequences from the KV cache.",
    "evicted_tokens": "Tokens evicted, per layer and KV head.",
    "released_blocks": "Blocks that long prompts gave back at their first eviction.",
    "admissions": "Requests that began to run, after a preemption too.",
}
GAUGES = {
    "held_tokens": "Tokens that running requests hold in the KV cache, per layer and KV head.",
    "logical_tokens": "Tokens that running requests have computed, evicted or not.",
    "evicting_requests": "Running requests that have evicted.",
    "outstanding_blocks": "Blocks that running requests can still come to need, at most.",
}
"""Metric to its documentation; each is a field of :class:`EvictionStatistics`."""
LABELLED_COUNTERS = {
    "admission_deferrals": LabelledCounter(
        "Steps in which the next waiting request was not admitted: too few blocks were free "
        "(full), or those that were are kept for running requests (promised).",
        "reason",
        {"promised": "deferrals_promised", "full": "deferrals_full"},
    ),
    "preemptions": LabelledCounter(
        "Preemptions, before and after the request's first eviction.",
        "first_eviction",
        {"before": "preemptions_before", "after": "preemptions_after"},
    ),
    "preempted_tokens": LabelledCounter(
        "Tokens that preempted requests had computed, and must compute again.",
        "first_eviction",
        {"before": "preempted_tokens_before", "after": "preempted_tokens_after"},
    ),
}
BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
"""Seconds, from a model of a test to a large one on few cores."""


class EvictionStatLogger(AggregateStatLoggerBase):
    """Exports what the engines' schedulers count, step by step.

    All metrics have the prefix ``vllm:kv_eviction_`` and vLLM's own labels. Beside ``COUNTERS``,
    ``GAUGES`` and ``LABELLED_COUNTERS`` there is ``vllm:kv_eviction_config_info``: 1, with the
    settings as labels; and on a CPU, whose workers wait for their evictions,
    ``vllm:kv_eviction_step_time_seconds``: a histogram of what they take of a step that has any.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._config = EvictionConfig.from_vllm(vllm_config)
        self._labels: dict[int, list[object]] = {
            index: [vllm_config.model_config.served_model_name, str(index)]
            for index in engine_indexes
        }

    def log_engine_initialized(self) -> None:
        """Register the metrics. Sooner, vLLM's own logger would unregister them on its way."""
        self._counters = {
            name: create_metric_per_engine(
                Counter(f"vllm:kv_eviction_{name}", documentation, LABELS), self._labels
            )
            for name, documentation in COUNTERS.items()
        }
        for name, (documentation, label, of_values) in LABELLED_COUNTERS.items():
            counter = Counter(f"vllm:kv_eviction_{name}", documentation, (*LABELS, label))
            for value, field in of_values.items():
                labels = {index: [*own, value] for index, own in self._labels.items()}
                self._counters[field] = create_metric_per_engine(counter, labels)
        self._step_times = {}
        if current_platform.is_cpu():
            histogram = Histogram(
                "vllm:kv_eviction_step_time_seconds",
                "Time that evictions take of a step, of steps with evictions.",
                LABELS,
                buckets=BUCKETS,
            )
            self._step_times = create_metric_per_engine(histogram, self._labels)
        self._gauges = {
            name: create_metric_per_engine(
                Gauge(
                    f"vllm:kv_eviction_{name}",
                    documentation,
                    LABELS,
                    multiprocess_mode="mostrecent",
                ),
                self._labels,
            )
            for name, documentation in GAUGES.items()
        }
        # Prometheus' Info does not work with several processes; vLLM uses a gauge for the same.
        # A policy's own keys may be no names of labels: they stand in one label, as in the log.
        info = Gauge(
            "vllm:kv_eviction_config_info",
            "Settings of --kv-eviction.",
            ("engine", "policy", "budget", "window", "settings"),
            multiprocess_mode="mostrecent",
        )
        config = self._config
        assert config is not None, "this logger is added only where eviction is on"
        for index in self._labels:
            values = (index, config.policy.name, config.budget, config.window, config)
            info.labels(*values).set(1)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Export what a step of an engine reports."""
        if scheduler_stats is None:
            return
        statistics = EvictionStatistics.take_from(scheduler_stats)
        if statistics is None:
            return
        for field, counters in self._counters.items():
            if number := getattr(statistics, field):
                counters[engine_idx].inc(number)
        for name, gauges in self._gauges.items():
            gauges[engine_idx].set(getattr(statistics, name))
        if statistics.eviction_microseconds and self._step_times:
            self._step_times[engine_idx].observe(statistics.eviction_microseconds * 1e-6)
