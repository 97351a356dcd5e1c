"""What a server says of its settings, as the benchmarks read it."""

from types import SimpleNamespace

import pytest
import requests
from vllm.config import CUDAGraphMode

from benchmarks.common import server


def config(graphs=CUDAGraphMode.FULL_AND_PIECEWISE, is_async=True):
    return {
        "model_config": {"enforce_eager": False},
        "cache_config": {"enable_prefix_caching": True},
        "scheduler_config": {"enable_chunked_prefill": True, "async_scheduling": is_async},
        "compilation_config": {"cudagraph_mode": graphs.value},
    }


@pytest.fixture
def settings(monkeypatch):
    def read(log, device="cuda", **changes):
        monkeypatch.setattr(server, "current_platform", SimpleNamespace(device_type=device))
        answer = SimpleNamespace(json=lambda: {"vllm_config": config(**changes)})
        monkeypatch.setattr(requests, "get", lambda *_, **__: answer)
        return server.settings_in_effect(SimpleNamespace(url="http://here", log=lambda: log))

    return read


def test_settings_of_a_gpu(settings):
    assert settings("Using FLASH_ATTN attention backend out of potential backends: []") == {
        "attention_backend": "FLASH_ATTN",
        "enforce_eager": "False",
        "cuda_graphs": "FULL_AND_PIECEWISE",
        "prefix_caching": "True",
        "chunked_prefill": "True",
        "device": "cuda",
        "async_scheduling": "True",
    }


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_async_scheduling_as_the_configuration_has_it(settings, device, is_async):
    found = settings("", device=device, graphs=CUDAGraphMode.NONE, is_async=is_async)
    assert (found["device"], found["async_scheduling"]) == (device, str(is_async))
    assert found["cuda_graphs"] == "NONE"
    assert "attention_backend" not in found


def test_a_mode_of_one_part_after_json(settings):
    assert settings("", graphs=CUDAGraphMode.PIECEWISE)["cuda_graphs"] == "PIECEWISE"
