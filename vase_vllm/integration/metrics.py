"""Prometheus metrics of eviction, at ``/metrics`` beside vLLM's own."""

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats
from vllm.v1.metrics.utils import create_metric_per_engine

from vase_vllm.config import EvictionConfig
from vase_vllm.engine.statistics import EvictionStatistics

LABELS = ("model_name", "engine")
COUNTERS = {
    "evictions": "Evictions of sequences from the KV cache.",
    "evicted_tokens": "Tokens evicted, per layer and KV head.",
    "released_blocks": "Blocks that long prompts gave back at their first eviction.",
}
GAUGES = {
    "held_tokens": "Tokens that running requests hold in the KV cache, per layer and KV head.",
    "logical_tokens": "Tokens that running requests have computed, evicted or not.",
    "evicting_requests": "Running requests that have evicted.",
}
"""Metric to its documentation; each is a field of :class:`EvictionStatistics`."""


class EvictionStatLogger(AggregateStatLoggerBase):
    """Exports what the engines' schedulers count, step by step.

    All metrics have the prefix ``vllm:kv_eviction_`` and vLLM's own labels. Beside ``COUNTERS`` and
    ``GAUGES`` there is ``vllm:kv_eviction_config_info``: 1, with the settings as labels.
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
        for name, counters in self._counters.items():
            counters[engine_idx].inc(getattr(statistics, name))
        for name, gauges in self._gauges.items():
            gauges[engine_idx].set(getattr(statistics, name))
