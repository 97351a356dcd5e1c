"""Prometheus metrics of eviction: there where eviction is on, nowhere else."""

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine import async_llm
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

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


def finished(*lengths):
    stats = IterationStats()
    stats.finished_requests = [
        FinishedRequestStats("length", num_prompt_tokens=prompt, num_generation_tokens=output)
        for prompt, output in lengths
    ]
    return stats


def value(name, **labels):
    return REGISTRY.get_sample_value(f"vllm:kv_eviction_{name}", labels)


def test_finished_requests_are_counted():
    logger = stat_logger(EVICTION)
    # The first evicts at 112, 128, 144 and 160: positions up to 168 are read. The second is short,
    # the third's prompt is cut from 208 to 96 tokens at once.
    logger.record(None, finished((20, 150), (20, 30), (200, 20)), engine_idx=1)
    assert value("evictions_total", **LABELS) == 4 + 0 + 1
    assert value("evicted_tokens_total", **LABELS) == 4 * 16 + 0 + 112
    assert value("evictions_total", **LABELS | {"engine": "0"}) == 0
    logger.record(None, None, engine_idx=1)
    assert value("evictions_total", **LABELS) == 5


def test_settings_are_labels():
    stat_logger(EVICTION)
    (family,) = [f for f in REGISTRY.collect() if f.name == "vllm:kv_eviction_config_info"]
    labels = family.samples[1].labels
    assert (labels["engine"], labels["policy"], labels["budget"]) == ("1", "vase", "96")
    assert "admission=reserve" in labels["settings"]
    assert "protected=7" in labels["settings"]


def test_an_engine_without_eviction_has_no_such_metrics():
    logger = stat_logger({})
    logger.record(None, finished((20, 150)))
    assert not [f for f in REGISTRY.collect() if "kv_eviction" in f.name]


@pytest.mark.parametrize(
    ("eviction", "disable_log_stats", "counted"),
    [(EVICTION, False, True), (EVICTION, True, False), ({}, False, False)],
)
def test_vllm_is_given_the_logger_only_where_eviction_and_statistics_are_on(
    models, monkeypatch, eviction, disable_log_stats, counted
):
    monkeypatch.setattr(async_llm, "load_stat_logger_plugin_factories", lambda: [str])
    AsyncEngineArgs(
        model=str(models.qwen3()),
        skip_tokenizer_init=True,
        additional_config=eviction,
        disable_log_stats=disable_log_stats,
    ).create_engine_config()
    expected = [str, EvictionStatLogger] if counted else [str]
    assert async_llm.load_stat_logger_plugin_factories() == expected
