"""vLLM's model runner V2, whole, on a CPU: the same tokens as runner V1, with evictions.

With vLLM's Triton attention in the place of the CPU backend, everything that would run on a GPU
runs under Triton's interpreter: the remapping, the ring, the fused eviction, on GPU pages.
"""

import pytest

from tests.support.engines import random_prompt
from tests.support.interpreted import run_case, run_interpreted

pytestmark = pytest.mark.slow

CASE = {
    "eviction": {"budget": 48, "window": 16},
    "prompts": [random_prompt(length, length) for length in (10, 48, 70, 100)],
    "num_tokens": 80,
    "options": {"max_num_batched_tokens": 40},
}


@pytest.fixture(scope="module")
def expected(models):
    """Runner V1 and the plain-torch path."""
    result = run_case(models.qwen3(), **CASE)
    assert result["runner"] == "vllm.v1.worker.cpu_model_runner"
    assert result["stats"]["evictions"] >= 12
    return result


def test_v2_silently_not_evicting(models, expected):
    """The trap of others' ports: hooks that runner V2 never calls. It must evict, and alike."""
    result = run_interpreted(models.qwen3(), triton_attention=False, **CASE)
    assert result["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert result["stats"] == expected["stats"]
    assert result["tokens"] == expected["tokens"]


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling": "gumbel"},
        {"sampling": "greedy"},
        {"policy": "snapkv"},
        {"policy": "streaming"},
        {"policy": "random"},
        # Not in the fused kernel: plain torch on the device's pages.
        {"policy": "rkv"},
        {"policy": "cur"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_evictions_on_gpu_pages_in_the_real_engine(models, settings):
    case = {
        "eviction": {"budget": 48, "window": 16, **settings},
        "prompts": [random_prompt(length, length) for length in (45, 70)],
        "num_tokens": 40,
        "options": {"max_num_batched_tokens": 40},
    }
    result = run_interpreted(models.qwen3(), triton_attention=True, warm_up=True, **case)
    assert result["impl"] == "EvictionTritonAttentionImpl"
    expected = run_case(models.qwen3(), **case)
    assert expected["impl"] == "EvictionCPUAttentionBackendImpl"
    assert result["stats"] == expected["stats"]
    assert result["stats"]["evictions"] >= 4
    assert result["tokens"] == expected["tokens"]
