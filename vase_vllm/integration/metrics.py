"""Prometheus metrics of eviction, at ``/metrics`` beside vLLM's own."""

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats
from vllm.v1.metrics.utils import create_metric_per_engine

from vase_vllm.config import EvictionConfig

LABELS = ("model_name", "engine")


class EvictionStatLogger(AggregateStatLoggerBase):
    """Counts what the schedule makes of every request that finishes.

    What a sequence evicts follows from its length, so the API server counts it without asking the
    workers. Evictions that a preempted sequence repeats are not in it; of an aborted request vLLM
    reports no lengths.

    Metrics, labelled as vLLM's own:
        ``vllm:kv_eviction_evictions_total``: evictions.
        ``vllm:kv_eviction_evicted_tokens_total``: tokens evicted, per layer and KV head.
        ``vllm:kv_eviction_config_info``: 1, with the settings as labels.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._config = EvictionConfig.from_vllm(vllm_config)
        self._labels: dict[int, list[object]] = {
            index: [vllm_config.model_config.served_model_name, str(index)]
            for index in engine_indexes
        }

    def log_engine_initialized(self) -> None:
        """Register the metrics. Sooner, vLLM's own logger would unregister them on its way."""
        config = self._config
        if config is None:
            return
        evictions = Counter(
            "vllm:kv_eviction_evictions",
            "Evictions from the KV cache of requests that have finished.",
            LABELS,
        )
        evicted_tokens = Counter(
            "vllm:kv_eviction_evicted_tokens",
            "Tokens evicted, per layer and KV head, from requests that have finished.",
            LABELS,
        )
        self._evictions = create_metric_per_engine(evictions, self._labels)
        self._evicted_tokens = create_metric_per_engine(evicted_tokens, self._labels)
        # Prometheus' Info does not work with several processes; vLLM uses a gauge for the same.
        # A policy's own keys may be no names of labels: they stand in one label, as in the log.
        info = Gauge(
            "vllm:kv_eviction_config_info",
            "Settings of --kv-eviction.",
            ("engine", "policy", "budget", "window", "settings"),
            multiprocess_mode="mostrecent",
        )
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
        """Count the requests that this iteration finished."""
        if self._config is None or iteration_stats is None:
            return
        for request in iteration_stats.finished_requests:
            num_evictions, num_evicted = self._config.schedule.evictions(
                request.num_prompt_tokens, request.num_generation_tokens
            )
            self._evictions[engine_idx].inc(num_evictions)
            self._evicted_tokens[engine_idx].inc(num_evicted)
