"""The routes of the status page on an application of their own, and how vLLM finds them."""

from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.plugins import load_endpoint_plugins
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from vase_vllm.status.plugin import StatusPage


class Engine:
    """An engine with one worker."""

    async def collective_rpc(self, method):
        return [[{"request_id": method, "held_tokens": 9}]]


def client(additional_config, log_stats=True):
    app = FastAPI()
    StatusPage().attach_router(app)
    app.state.vllm_config = SimpleNamespace(additional_config=additional_config)
    app.state.engine_client = Engine()
    app.state.log_stats = log_stats
    return TestClient(app)


ON = {"kv_eviction": {"policy": "random", "budget": 96, "window": 16}}


def test_status_has_settings_and_numbers():
    status = client(ON).get("/kv_eviction/status").json()
    assert status["policy"] == "random"
    assert "budget=96" in status["settings"]
    assert {"compression", "blocks", "used_blocks", "preemptions"} < status.keys()


def test_requests_come_from_the_workers():
    requests = client(ON).get("/kv_eviction/requests").json()
    assert requests == [{"request_id": "get_kv_eviction_requests", "held_tokens": 9}]


def test_the_page_needs_nothing_from_elsewhere():
    response = client(ON).get("/kv_eviction")
    assert response.headers["content-type"].startswith("text/html")
    text = response.text
    assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")
    assert "src=" not in text
    assert "href=" not in text


@pytest.mark.parametrize("route", ["status", "requests"])
def test_without_eviction_there_is_nothing_to_show(route):
    response = client({}).get(f"/kv_eviction/{route}")
    assert response.status_code == 404
    assert "--kv-eviction" in response.json()["detail"]


def test_without_metrics_the_remedy_is_named():
    response = client(ON, log_stats=False).get("/kv_eviction/status")
    assert response.status_code == 503
    assert "--disable-log-stats" in response.json()["detail"]


def test_vllm_loads_it_only_where_it_is_named(monkeypatch):
    (point,) = entry_points(group="vllm.endpoint_plugins", name="vase-status")
    assert point.load() is StatusPage
    assert isinstance(StatusPage(), EndpointPlugin)
    for named, found in (("vase", []), ("vase,vase-status", ["vase-status"])):
        monkeypatch.setenv("VLLM_PLUGINS", named)
        assert [plugin.name for plugin in load_endpoint_plugins(("generate",))] == found
    monkeypatch.delenv("VLLM_PLUGINS")
    assert load_endpoint_plugins(("generate",)) == []
