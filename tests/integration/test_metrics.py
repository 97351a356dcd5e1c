"""Prometheus metrics of eviction: there where eviction is on, nowhere else."""

from types import SimpleNamespace

import msgspec
import pytest
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.metrics.loggers import (
    AggregateStatLoggerBase,
    PrometheusStatLogger,
    StatLoggerManager,
)
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from vase_vllm.engine.statistics import EvictionStatistics
from vase_vllm.integration.metrics import EvictionStatLogger

EVICTION = {"kv_eviction": {"policy": "vase", "budget": 96, "window": 16, "protected": 7}}
LABELS = {"model_name": "tiny", "engine": "1"}


@pytest.fixture(autouse=True)
def clean_registry():
    unregister_vllm_metrics()
    yield
    unregister_vllm_metrics()


def stat_logger(additional_config):
    config = SimpleNamespace(
        additional_config=additional_config,
        model_config=SimpleNamespace(served_model_name="tiny"),
    )
    logger = EvictionStatLogger(config, [0, 1])
    logger.log_engine_initialized()
    return logger


def reported(**numbers):
    """What a scheduler reports of a step."""
    stats = SchedulerStats()
    EvictionStatistics(**numbers).put_into(stats)
    return stats


def value(name, **labels):
    return REGISTRY.get_sample_value(f"vllm:kv_eviction_{name}", labels)


def test_steps_are_counted():
    logger = stat_logger(EVICTION)
    first = {"evictions": 4, "evicted_tokens": 64, "held_tokens": 100, "logical_tokens": 164}
    logger.record(reported(**first, evicting_requests=1), None, engine_idx=1)
    assert value("evictions_total", **LABELS) == 4
    assert value("held_tokens", **LABELS) == 100
    assert value("evicting_requests", **LABELS) == 1
    logger.record(reported(evictions=1, evicted_tokens=112), None, engine_idx=1)
    assert value("evictions_total", **LABELS) == 5
    assert value("evicted_tokens_total", **LABELS) == 176
    assert value("logical_tokens", **LABELS) == 0
    assert value("evictions_total", **LABELS | {"engine": "0"}) == 0


def test_reasons_are_labels():
    logger = stat_logger(EVICTION)
    numbers = {"deferrals_promised": 1, "preemptions_after": 2, "preempted_tokens_after": 700}
    logger.record(reported(**numbers), None, engine_idx=1)
    logger.record(reported(deferrals_promised=1, deferrals_full=1), None, engine_idx=1)
    assert value("admission_deferrals_total", **LABELS, reason="promised") == 2
    assert value("admission_deferrals_total", **LABELS, reason="full") == 1
    assert value("preemptions_total", **LABELS, first_eviction="before") == 0
    assert value("preemptions_total", **LABELS, first_eviction="after") == 2
    assert value("preempted_tokens_total", **LABELS, first_eviction="after") == 700
    assert value("preempted_tokens_total", **LABELS, first_eviction="before") == 0


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_time_of_evictions_is_a_histogram_where_it_is_known(monkeypatch, on_cpu):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: on_cpu)
    logger = stat_logger(EVICTION)
    for microseconds in (0, 1500, 300_000):
        logger.record(reported(eviction_microseconds=microseconds), None, engine_idx=1)
    assert value("step_time_seconds_count", **LABELS) == (2 if on_cpu else None)
    if on_cpu:
        assert value("step_time_seconds_sum", **LABELS) == pytest.approx(0.3015)
        assert value("step_time_seconds_bucket", **LABELS, le="0.002") == 1


def test_steps_without_statistics_change_nothing():
    logger = stat_logger(EVICTION)
    logger.record(None, None)
    logger.record(SchedulerStats(), None)
    assert value("evictions_total", **LABELS | {"engine": "0"}) == 0


def test_vllm_sees_nothing_of_our_numbers():
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 2})
    EvictionStatistics(evictions=3).put_into(stats)
    # As they travel between the processes.
    sent = msgspec.msgpack.encode(stats)
    received = msgspec.msgpack.decode(sent, type=SchedulerStats)
    assert EvictionStatistics.take_from(received) == EvictionStatistics(evictions=3)
    assert received == SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 2})


def test_settings_are_labels():
    stat_logger(EVICTION)
    (family,) = [f for f in REGISTRY.collect() if f.name == "vllm:kv_eviction_config_info"]
    labels = family.samples[1].labels
    assert (labels["engine"], labels["policy"], labels["budget"]) == ("1", "vase", "96")
    assert "admission=expected" in labels["settings"]
    assert "protected=7" in labels["settings"]


@pytest.mark.parametrize(("eviction", "counted"), [(EVICTION, True), ({}, False)])
def test_vllm_is_given_the_logger_only_where_eviction_is_on(models, eviction, counted):
    """In a process that has patched vLLM for an engine with eviction, others stay as they are."""
    options = {"model": str(models.qwen3()), "skip_tokenizer_init": True}
    AsyncEngineArgs(**options, additional_config=EVICTION).create_engine_config()
    config = AsyncEngineArgs(**options, additional_config=eviction).create_engine_config()
    manager = StatLoggerManager(config, [0], custom_stat_loggers=[CustomLogger])
    kinds = [type(logger) for logger in manager.stat_loggers]
    # Ours takes its numbers out before any other logger looks.
    assert (kinds[0] is EvictionStatLogger) == counted
    assert CustomLogger in kinds
    assert PrometheusStatLogger in kinds


class CustomLogger(AggregateStatLoggerBase):
    """A user's own."""

    def __init__(self, vllm_config, engine_indexes):
        pass

    def record(self, *args, **kwargs):
        pass

    def log_engine_initialized(self):
        pass
