"""Every process that vLLM spawns knows of the eviction, however the settings came."""

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
        server.wait_until(r"Application startup complete[\s\S]*Application startup complete")
        body = {"model": "tiny", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        for number in range(6):
            response = server.post("/v1/completions", body | {"prompt": f"{number} " * 20})
            assert response.json()["usage"]["completion_tokens"] == 200
            refused = server.post("/v1/completions", body | {"prompt": "b" * 3800})
            assert refused.status_code == 400
            assert "KV cache blocks until its first" in refused.json()["error"]["message"]
        counted = sum(
            sample.value
            for sample in server.metrics()["vllm:kv_eviction_evictions"].samples
            if sample.name.endswith("_total")
        )
        assert counted == server.eviction_stats()["evictions"] > 0
