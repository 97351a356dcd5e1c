"""vLLM's model runner V2, whole, on a CPU: the same tokens as runner V1, with evictions.

With vLLM's Triton attention in the place of the CPU backend, everything that would run on a GPU
runs under Triton's interpreter: the remapping, the ring, the fused eviction, on GPU pages.
"""

import pytest

from tests.support.engines import random_prompt
from tests.support.interpreted import run_case, run_interpreted

pytestmark = pytest.mark.slow

# The interpreter samples from a small vocabulary much faster.
MODEL = {"vocab_size": 1024}


def prompt(num_tokens: int, seed: int) -> list[int]:
    return random_prompt(num_tokens, seed, MODEL["vocab_size"])


SHARED = prompt(32, 0)
ON_RUNNER_V1 = {
    "eviction": {"budget": 48, "window": 16},
    "prompts": [prompt(length, length) for length in (10, 48, 70, 100)],
    "num_tokens": 80,
    "options": {"max_num_batched_tokens": 40},
}
# Evicts twice, too, 8 and 10 tokens after the prompt.
BESIDE_THE_PROMPT = {"prompt": "keep", "budget": 6, "window": 2}
SETTINGS = {
    "gumbel": {"sampling": "gumbel"},
    "greedy": {"sampling": "greedy", "prefill": "bounded"},
    "snapkv": {"policy": "snapkv", **BESIDE_THE_PROMPT},
    "streaming": {"policy": "streaming"},
    "random": {"policy": "random", **BESIDE_THE_PROMPT},
    "distinct": {"policy": "distinct"},
    "remembering": {"policy": "distinct", "memory": 0.9},
    "strata": {"policy": "distinct", "protected": 6, "memory": 0.9, "strata": 2},
    # Not in the fused kernel: plain torch on the device's pages.
    "rkv": {"policy": "rkv"},
}
CASES = {
    name: {
        "eviction": {"budget": 24, "window": 8, **settings},
        # Each evicts twice, at 32 and 40, at 40 and 48; a bounded prefill of 38 tokens at 32, too.
        "prompts": [prompt(length, length) for length in (30, 38)],
        "num_tokens": 12,
        "options": {"max_num_batched_tokens": 40},
    }
    for name, settings in SETTINGS.items()
}
# One of each way to evict: in the fused kernel, with all that there is of it, and in plain torch.
WARMED_UP = ("gumbel", "strata", "rkv")
PREFIX_CACHING = {
    "eviction": {"budget": 24, "window": 8},
    "prompts": [SHARED + prompt(3, seed) for seed in range(3)],
    "num_tokens": 12,
}


@pytest.fixture(scope="module")
def on_gpu_pages(models):
    """Every case on GPU pages, in one process: starting it takes longer than a case."""
    cases = [case | {"warm_up": name in WARMED_UP} for name, case in CASES.items()]
    # One prompt after the other; the second and third find what the first has left.
    options = {"max_num_batched_tokens": 40, "max_num_seqs": 1}
    cases.append(PREFIX_CACHING | {"options": options})
    results = run_interpreted(models.qwen3(**MODEL), cases, triton_attention=True)
    return dict(zip([*CASES, "prefix caching"], results, strict=True))


def test_v2_silently_not_evicting(models):
    """The trap of others' ports: hooks that runner V2 never calls. It must evict, and alike."""
    expected = run_case(models.qwen3(**MODEL), **ON_RUNNER_V1)
    assert expected["runner"] == "vllm.v1.worker.cpu_model_runner"
    assert expected["stats"]["evictions"] >= 12
    (result,) = run_interpreted(models.qwen3(**MODEL), [ON_RUNNER_V1], triton_attention=False)
    assert result["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert result["stats"] == expected["stats"]
    assert result["tokens"] == expected["tokens"]


@pytest.mark.parametrize("name", CASES)
def test_evictions_on_gpu_pages_in_the_real_engine(models, on_gpu_pages, name):
    result = on_gpu_pages[name]
    assert "error" not in result, result["error"]
    assert result["impl"] == "EvictionTritonAttentionImpl"
    expected = run_case(models.qwen3(**MODEL), **CASES[name])
    assert expected["impl"] == "EvictionCPUAttentionBackendImpl"
    assert result["stats"] == expected["stats"]
    is_bounded = "prefill" in CASES[name]["eviction"]
    assert result["stats"]["evictions"] == 4 + is_bounded
    assert result["tokens"] == expected["tokens"]


def test_prefix_caching_on_gpu_pages(models, on_gpu_pages):
    result = on_gpu_pages["prefix caching"]
    assert "error" not in result, result["error"]
    options = {"enable_prefix_caching": False}
    without = run_case(models.qwen3(**MODEL), **PREFIX_CACHING, options=options)
    assert result["runner"] == "vllm.v1.worker.cpu.model_runner"
    # The first eviction, at position 40, needs the queries from 32 on.
    assert (without["cached"], result["cached"]) == ([0, 0, 0], [0, 32, 32])
    assert result["tokens"] == without["tokens"]
    assert result["stats"]["evictions"] == without["stats"]["evictions"] > 0
