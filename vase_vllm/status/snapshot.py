"""What the status page says of the engines: the metrics that ``/metrics`` has, in a few numbers."""

from collections.abc import Iterable

from prometheus_client import Metric
from vllm.v1.metrics.prometheus import get_prometheus_registry

SUMS = {
    "running_requests": "vllm:num_requests_running",
    "waiting_requests": "vllm:num_requests_waiting",
    "preemptions": "vllm:num_preemptions_total",
    "output_tokens": "vllm:generation_tokens_total",
    "evicting_requests": "vllm:kv_eviction_evicting_requests",
    "evictions": "vllm:kv_eviction_evictions_total",
    "held_tokens": "vllm:kv_eviction_held_tokens",
    "logical_tokens": "vllm:kv_eviction_logical_tokens",
}
"""A number's name to the metric whose samples, one for each engine, it is the sum of."""

USAGE = "vllm:kv_cache_usage_perc"
CACHE_CONFIG = "vllm:cache_config_info"


def snapshot() -> dict[str, float | None]:
    """The numbers of now, over all engines and API servers.

    Beside ``SUMS`` there are ``blocks`` of the KV cache of all engines, ``used_blocks`` of them,
    and ``compression``: logical tokens per held token, None while no request runs.
    """
    return summarize(get_prometheus_registry().collect())


def summarize(metrics: Iterable[Metric]) -> dict[str, float | None]:
    """The numbers of :func:`snapshot` from collected metrics."""
    totals = dict.fromkeys(SUMS.values(), 0.0)
    usage: list[float] = []
    num_blocks = 0
    for metric in metrics:
        for sample in metric.samples:
            if sample.name in totals:
                totals[sample.name] += sample.value
            elif sample.name == USAGE:
                usage.append(sample.value)
            elif sample.name == CACHE_CONFIG:
                num_blocks = int(sample.labels["num_gpu_blocks"])
    result: dict[str, float | None] = {name: totals[metric] for name, metric in SUMS.items()}
    # The null block is never used, and vLLM's usage does not count it.
    result["blocks"] = (num_blocks - 1) * len(usage)
    result["used_blocks"] = round(sum(usage) * (num_blocks - 1))
    held = result["held_tokens"]
    result["compression"] = totals[SUMS["logical_tokens"]] / held if held else None
    return result
