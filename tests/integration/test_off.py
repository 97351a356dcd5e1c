"""Installed but not asked for, the plugin changes nothing."""

import json
import os
import subprocess
import sys

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.support.engines import engine, generate, greedy, random_prompt

SCRIPT = """
import json, sys
from tests.support.engines import engine, generate, greedy, random_prompt
with engine(sys.argv[1], None) as llm:
    tokens = generate(llm, [random_prompt(n, n) for n in (9, 300)], greedy(100))
print(json.dumps({"tokens": tokens, "vase": [m for m in sys.modules if m.startswith("vase_vllm")]}))
"""


@pytest.mark.slow
def test_same_tokens_as_without_the_plugin(models):
    environment = {**os.environ, "VLLM_PLUGINS": "", "PYTHONPATH": os.getcwd()}
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(models.qwen3())],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    without = json.loads(output.strip().splitlines()[-1])
    assert without["vase"] == []
    with engine(models.qwen3(), None) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        assert type(worker).__module__ == "vllm.v1.worker.cpu_worker"
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert type(scheduler).__module__.startswith("vllm.v1.core.sched")
        layers = worker.compilation_config.static_forward_context.values()
        assert all(type(layer.impl).__module__.startswith("vllm.") for layer in layers)
        assert all(layer.attn_backend.__module__.startswith("vllm.") for layer in layers)
        tokens = generate(llm, [random_prompt(n, n) for n in (9, 300)], greedy(100))
    assert tokens == without["tokens"]


def test_the_config_of_an_engine_is_untouched(models):
    config = EngineArgs(model=str(models.qwen3()), skip_tokenizer_init=True).create_engine_config()
    assert config.additional_config == {}
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.cache_config.enable_prefix_caching


def test_no_backend_is_overridden(models):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for eviction in ({}, {"kv_eviction": {"policy": "vase", "budget": 128}}):
        EngineArgs(
            model=str(models.qwen3()), skip_tokenizer_init=True, additional_config=eviction
        ).create_engine_config()
        assert not AttentionBackendEnum.CPU_ATTN.is_overridden()
