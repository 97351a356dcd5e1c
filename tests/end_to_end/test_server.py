"""The real server over HTTP: streams under eviction, refuses what cannot fit, loses nothing."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.server import Server
from vase_vllm.tools.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

ARGUMENTS = [
    *["--enforce-eager", "--max-model-len", "4096", "--block-size", "32", "--dtype", "float32"],
    *["--kv-eviction", "vase", "--kv-eviction-config.budget", "128"],
    *["--kv-eviction-config.window", "16", "--kv-cache-memory-bytes", "4M"],
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = make_tiny_model(tmp_path_factory.mktemp("server") / "model", layers=2, dtype="float32")
    with Server(model, [*ARGUMENTS, "--served-model-name", "tiny"]) as server:
        server.wait_until_ready()
        yield server


def complete(server, prompt, max_tokens=300, **options):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return server.post("/v1/completions", body | {"ignore_eos": True} | options)


def test_stream_evicts_and_gives_its_blocks_back(server):
    before = server.eviction_stats()["evictions"]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 600,
        "ignore_eos": True,
        "stream": True,
    }
    response = requests.post(
        server.url + "/v1/chat/completions", json=body, stream=True, timeout=600
    )
    lines = [line[6:] for line in response.iter_lines() if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"
    assert server.eviction_stats()["evictions"] - before >= 25
    assert server.num_used_blocks() == 0


def test_a_prompt_that_cannot_fit_is_http_400_and_others_go_on(server):
    with ThreadPoolExecutor() as pool:
        running = pool.submit(complete, server, "a" * 50)
        refused = complete(server, "b" * 3900)
        assert refused.status_code == 400
        message = refused.json()["error"]["message"]
        assert "KV cache blocks until its first eviction" in message
        assert "\n" not in message
        assert running.result().json()["usage"]["completion_tokens"] == 300


def test_more_requests_than_the_pool_holds_all_finish_alike(server):
    prompts = ["the quick brown fox " * n for n in range(1, 13)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: complete(server, prompt), prompts))
    alone = [complete(server, prompt) for prompt in prompts[::3]]
    for a, b in zip(together[::3], alone, strict=True):
        assert a.json()["choices"][0]["text"] == b.json()["choices"][0]["text"]
    assert server.num_used_blocks() == 0


def evictions(server):
    """Evictions by `/metrics`."""
    samples = server.metrics()["vllm:kv_eviction_evictions"].samples
    assert samples[0].name == "vllm:kv_eviction_evictions_total"
    assert samples[0].labels == {"model_name": "tiny", "engine": "0"}
    return samples[0].value


def test_metrics_count_what_the_workers_evict(server):
    before = evictions(server)
    complete(server, "m" * 200, max_tokens=250)
    assert evictions(server) - before > 10
    assert evictions(server) == server.eviction_stats()["evictions"]
    settings = server.metrics()["vllm:kv_eviction_config_info"].samples[0].labels
    assert (settings["policy"], settings["budget"]) == ("vase", "128")


def test_a_client_that_hangs_up_is_counted_and_frees_its_blocks(server):
    before = evictions(server)
    body = {"model": "tiny", "prompt": "c" * 40, "max_tokens": 3000, "stream": True}
    response = requests.post(server.url + "/v1/completions", json=body, stream=True, timeout=60)
    lines = response.iter_lines()
    # vLLM's gauge follows the engine's steps; were it never to move, the stream would end here.
    while evictions(server) < before + 2:
        next(lines)
    assert server.num_used_blocks() > 0
    samples = {
        name: server.metrics()[f"vllm:kv_eviction_{name}"].samples[0].value
        for name in ("held_tokens", "logical_tokens", "evicting_requests")
    }
    assert 128 < samples["held_tokens"] <= 144 < samples["logical_tokens"]
    assert samples["evicting_requests"] == 1
    response.close()
    # One more request makes the engine step, and its metrics current.
    complete(server, "d", max_tokens=5)
    assert server.num_used_blocks() == 0
    assert server.metrics()["vllm:kv_eviction_held_tokens"].samples[0].value == 0
    assert evictions(server) == server.eviction_stats()["evictions"]


@pytest.mark.parametrize(
    ("own", "schedule"),
    [
        ({"kv_eviction_budget": 64}, EvictionSchedule(64, 16)),
        ({"kv_eviction_prompt": "keep"}, EvictionSchedule(128, 16, keeps_prompt=True)),
        ({"kv_eviction": "none"}, None),
    ],
    ids=["budget", "prompt", "none"],
)
def test_settings_of_a_request(server, own, schedule):
    before = evictions(server)
    usage = complete(server, "e" * 100, vllm_xargs=own).json()["usage"]
    lengths = usage["prompt_tokens"], usage["completion_tokens"]
    assert lengths[1] == 300
    assert evictions(server) - before == (schedule.evictions(*lengths)[0] if schedule else 0)
    assert evictions(server) == server.eviction_stats()["evictions"]


def test_settings_that_a_request_cannot_have_are_http_400(server):
    refused = complete(server, "e", vllm_xargs={"kv_eviction_budget": 129})
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert message.startswith("vllm_xargs.kv_eviction_budget: must be an integer above window (16)")
