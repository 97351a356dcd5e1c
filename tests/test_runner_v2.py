"""vLLM's model runner V2, whole, on a CPU: the same tokens as runner V1, with evictions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import engine, eviction_stats, generate, greedy, random_prompt

pytestmark = pytest.mark.slow

EVICTION = {"budget": 64, "window": 16}
PROMPTS = [random_prompt(length, length) for length in (10, 64, 100, 150)]
NUM_TOKENS = 110

SCRIPT = """
import json, sys
from tests.engines import engine, eviction_stats, generate, greedy
from tests.test_runner_v2 import EVICTION, NUM_TOKENS, PROMPTS
with engine(sys.argv[1], EVICTION, max_num_batched_tokens=64) as llm:
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    tokens = generate(llm, PROMPTS, greedy(NUM_TOKENS))
    print(json.dumps([type(runner).__module__, tokens, eviction_stats(llm)["evictions"]]))
"""


def test_v2_silently_not_evicting(models):
    """The trap of others' ports: hooks that runner V2 never calls. It must evict, and alike."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": f"{Path(__file__).parent / 'runner_v2'}{os.pathsep}{os.getcwd()}",
    }
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(models.qwen3())],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    module, tokens_v2, evictions_v2 = json.loads(output.strip().splitlines()[-1])
    assert module == "vllm.v1.worker.cpu.model_runner"
    with engine(models.qwen3(), EVICTION, max_num_batched_tokens=64) as llm:
        tokens_v1 = generate(llm, PROMPTS, greedy(NUM_TOKENS))
        evictions_v1 = eviction_stats(llm)["evictions"]
    assert evictions_v2 == evictions_v1 > 16
    assert tokens_v2 == tokens_v1
