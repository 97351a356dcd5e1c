"""Every process that vLLM spawns knows of the eviction, however the settings came."""

import time

import pytest

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
]


def test_api_servers_that_are_spawned(tmp_path):
    """They read the parsed arguments before they have loaded the plugin."""
    model = make_tiny_model(tmp_path / "model", layers=2, dtype="float32")
    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = [*ARGUMENTS, "--config", str(tmp_path / "config.yaml"), "--api-server-count", "2"]
    with Server(model, arguments) as server:
        both = r"Application startup complete[\s\S]*Application startup complete"
        server.wait_until(both, timeout=500)
        body = {"model": "tiny", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        for number in range(6):
            response = server.post("/v1/completions", body | {"prompt": f"{number} " * 20})
            assert response.json()["usage"]["completion_tokens"] == 200
            refused = server.post("/v1/completions", body | {"prompt": "b" * 3800})
            assert refused.status_code == 400
            assert "KV cache blocks until its first" in refused.json()["error"]["message"]
        expected = server.eviction_stats()["evictions"]
        assert expected > 0
        # An API server counts a request just after it has sent the end of its response.
        deadline = time.monotonic() + 60
        while num_counted(server) != expected and time.monotonic() < deadline:
            time.sleep(0.5)
        assert num_counted(server) == expected


def num_counted(server: Server) -> float:
    """Evictions by `/metrics`, over all API servers."""
    samples = server.metrics()["vllm:kv_eviction_evictions"].samples
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))
