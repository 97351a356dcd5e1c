"""Every process that vLLM spawns knows of the eviction, however the settings came."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.server import Server
from vase_vllm.tools.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

CONFIG = """\
kv-eviction: vase
kv-eviction-config:
  budget: 128
  window: 16
"""
ARGUMENTS = [
    *["--enforce-eager", "--max-model-len", "4096", "--block-size", "32", "--dtype", "float32"],
    *["--kv-cache-memory-bytes", "4M", "--served-model-name", "tiny"],
    # Each engine with its worker in one process, which saves two that would import vLLM.
    *["--distributed-executor-backend", "uni"],
]
NUM_REQUESTS, NUM_TOKENS = 8, 200


def test_two_engines_behind_two_api_servers(tmp_path):
    """API servers that are spawned read the parsed arguments before they load the plugin."""
    model = make_tiny_model(tmp_path / "model", layers=2, dtype="float32")
    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = ["--config", str(tmp_path / "config.yaml"), "--data-parallel-size", "2"]
    with Server(model, [*ARGUMENTS, *arguments]) as server:
        both = r"Application startup complete[\s\S]*Application startup complete"
        server.wait_until(both, timeout=1200)

        def complete(number: int) -> tuple[str, int]:
            body = {"model": "tiny", "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
            response = server.post("/v1/completions", body | {"prompt": f"{number} " * 20})
            completion = response.json()
            assert completion["usage"]["completion_tokens"] == NUM_TOKENS
            refused = server.post("/v1/completions", body | {"prompt": "b" * 3800})
            assert refused.status_code == 400
            assert "KV cache blocks until its first" in refused.json()["error"]["message"]
            return completion["choices"][0]["text"], completion["usage"]["prompt_tokens"]

        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            together = list(pool.map(complete, range(NUM_REQUESTS)))
        # Whichever engine serves a request, its tokens are the same.
        assert [complete(number) for number in range(NUM_REQUESTS)] == together
        schedule = EvictionSchedule(budget=128, window=16)
        expected = 2 * sum(schedule.evictions(length, NUM_TOKENS)[0] for _, length in together)
        assert expected > 0
        # An API server counts a step just after it has sent the step's tokens.
        deadline = time.monotonic() + 60
        while sum(num_counted(server).values()) != expected and time.monotonic() < deadline:
            time.sleep(0.5)
        counted = num_counted(server)
        assert sum(counted.values()) == expected
        assert counted.keys() == {"0", "1"}
        assert all(counted.values()), "one engine has served everything"


def num_counted(server: Server) -> dict[str, float]:
    """Evictions of each engine by `/metrics`, over all API servers."""
    samples = server.metrics()["vllm:kv_eviction_evictions"].samples
    return {s.labels["engine"]: s.value for s in samples if s.name.endswith("_total")}
