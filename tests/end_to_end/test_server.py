"""The real server over HTTP: streams under eviction, refuses what cannot fit, loses nothing."""

import itertools
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.server import Server
from vase_vllm.tools.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
    *["--enforce-eager", "--max-model-len", "4096", "--block-size", "32", "--dtype", "float32"],
    *["--kv-eviction", "vase", "--kv-eviction-config.budget", "128"],
    *["--kv-eviction-config.window", "16", "--kv-cache-memory-bytes", "4M"],
    # So that it is known which requests wait, and why.
    *["--kv-eviction-config.admission", "reserve"],
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = make_tiny_model(tmp_path_factory.mktemp("server") / "model", layers=2, dtype="float32")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_PLUGINS", "vase,vase-status")
        server = Server(model, [*ARGUMENTS, "--served-model-name", "tiny"])
        with server:
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


def counted(server, name, **labels):
    """A metric of eviction by `/metrics`; a counter's name ends with `_total`."""
    wanted = {"model_name": "tiny", "engine": "0"} | labels
    (value,) = (
        sample.value
        for family in server.metrics().values()
        for sample in family.samples
        if sample.name == f"vllm:kv_eviction_{name}" and sample.labels == wanted
    )
    return value


def test_more_requests_than_the_pool_holds_all_finish_alike(server):
    prompts = ["the quick brown fox " * n for n in range(1, 13)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: complete(server, prompt), prompts))
    alone = [complete(server, prompt) for prompt in prompts[::3]]
    for a, b in zip(together[::3], alone, strict=True):
        assert a.json()["choices"][0]["text"] == b.json()["choices"][0]["text"]
    assert server.num_used_blocks() == 0


def test_metrics_say_why_requests_wait(server):
    """Ten requests can grow to six blocks each, of 63; others wait, and a block would do."""
    names = {
        "admissions_total": {},
        "admission_deferrals_total": {"reason": "promised"},
        "preemptions_total": {"first_eviction": "after"},
    }
    before = {name: counted(server, name, **labels) for name, labels in names.items()}
    full = counted(server, "admission_deferrals_total", reason="full")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: complete(server, f"{n} waits", max_tokens=250), range(16)))
    after = {name: counted(server, name, **labels) for name, labels in names.items()}
    assert after["admissions_total"] == before["admissions_total"] + 16
    promised = after["admission_deferrals_total"] - before["admission_deferrals_total"]
    assert promised > 50
    assert counted(server, "admission_deferrals_total", reason="full") == full
    assert after["preemptions_total"] == before["preemptions_total"]
    # The last step, after which nothing runs.
    assert counted(server, "outstanding_blocks") == 0


def evictions(server):
    """Evictions by `/metrics`."""
    return counted(server, "evictions_total")


def test_metrics_count_what_the_workers_evict(server):
    before, num_timed = evictions(server), counted(server, "step_time_seconds_count")
    seconds, start = counted(server, "step_time_seconds_sum"), time.monotonic()
    complete(server, "m" * 200, max_tokens=250)
    elapsed = time.monotonic() - start
    num_evictions = evictions(server) - before
    assert num_evictions > 10
    assert evictions(server) == server.eviction_stats()["evictions"]
    # The request ran alone: each of its evictions was in a step of its own.
    assert counted(server, "step_time_seconds_count") - num_timed == num_evictions
    assert 0 < counted(server, "step_time_seconds_sum") - seconds < elapsed
    settings = server.metrics()["vllm:kv_eviction_config_info"].samples[0].labels
    assert (settings["policy"], settings["budget"]) == ("vase", "128")


def test_a_long_prompt_gives_blocks_back(server):
    before = counted(server, "released_blocks_total")
    prompt_tokens = complete(server, "g" * 500, max_tokens=60).json()["usage"]["prompt_tokens"]
    schedule = EvictionSchedule(128, 16)
    first = schedule.first_eviction(prompt_tokens)
    released = counted(server, "released_blocks_total") - before
    assert released == -(-first // 32) - -(-schedule.bound // 32) > 0


def test_grafanas_dashboard_asks_for_metrics_that_there_are(server):
    dashboard = (ROOT / "docker/grafana/dashboards/kv-eviction.json").read_text()
    asked = set(re.findall(r"vllm:\w+", dashboard))
    there = {s.name for family in server.metrics().values() for s in family.samples}
    assert len(asked) > 10
    assert asked <= there


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


def stream(server, prompt, max_tokens=300):
    """The choices of a stream, one for each token; the next ones while it is read."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    response = requests.post(
        server.url + "/v1/completions",
        json=body | {"ignore_eos": True, "stream": True},
        stream=True,
        timeout=600,
    )
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            yield from json.loads(line[6:])["choices"]


@pytest.mark.parametrize(
    ("pause", "resume", "computes_again"),
    [
        ("/pause?mode=keep", "/resume", True),
        ("/pause?mode=keep&clear_cache=false", "/resume", False),
        ("/sleep?level=1&mode=keep", "/wake_up", True),
    ],
)
def test_a_request_that_is_paused_goes_on_with_the_same_tokens(
    server, pause, resume, computes_again
):
    """A CPU's worker frees no memory when it sleeps; but the cache is forgotten all the same."""
    prompt = "p" * 60
    undisturbed = complete(server, prompt).json()["choices"][0]["text"]
    before = evictions(server)
    running = stream(server, prompt)
    text = "".join(choice["text"] for choice in itertools.islice(running, 120))
    server.post(pause, {}).raise_for_status()
    with ThreadPoolExecutor() as pool:
        try:
            assert requests.get(server.url + "/is_paused", timeout=60).json()["is_paused"]
            waiting = pool.submit(complete, server, "q", max_tokens=2)
            evicted = server.eviction_stats()["evictions"]
            time.sleep(0.3)
            assert not waiting.done()
            assert server.eviction_stats()["evictions"] == evicted
        finally:
            server.post(resume, {}).raise_for_status()
        text += "".join(choice["text"] for choice in running)
        assert waiting.result().json()["usage"]["completion_tokens"] == 2
    assert text == undisturbed
    wanted, _ = EvictionSchedule(128, 16).evictions(60, 300)
    assert (evictions(server) - before > wanted) == computes_again
    assert server.num_used_blocks() == 0


@pytest.mark.parametrize(("mode", "reason"), [("wait", "length"), ("abort", "abort")])
def test_a_pause_that_keeps_no_request(server, mode, reason):
    running = stream(server, "w" * 60)
    for _ in range(120):
        next(running)
    server.post(f"/pause?mode={mode}", {}).raise_for_status()
    server.post("/resume", {}).raise_for_status()
    assert [choice["finish_reason"] for choice in running][-1] == reason
    # One more request makes the engine step, and its metrics current.
    complete(server, "d", max_tokens=5)
    assert server.num_used_blocks() == 0


def test_beam_search_evicts_nothing(server):
    before = evictions(server)
    prompt = "b" * 140
    found = complete(server, prompt, 30, use_beam_search=True, n=3).json()["choices"]
    assert len({choice["text"] for choice in found}) == 3
    (alone,) = complete(server, prompt, 30, use_beam_search=True).json()["choices"]
    full = complete(server, prompt, 30, vllm_xargs={"kv_eviction": "none"}).json()["choices"]
    assert alone["text"] == full[0]["text"]
    assert evictions(server) == before
    assert server.num_used_blocks() == 0
    # A beam is a prompt; here it outgrows the pool, of 63 blocks, on its way.
    refused = complete(server, "b" * 1980, 50, use_beam_search=True, n=2)
    assert refused.status_code == 400
    assert "KV cache blocks until its first eviction" in refused.json()["error"]["message"]


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


@pytest.mark.parametrize("own", [{}, {"kv_eviction_budget": 64}, {"kv_eviction": "none"}])
def test_a_request_that_asks_is_told_what_it_evicted(server, own):
    before = evictions(server)
    response = complete(server, "r" * 90, vllm_xargs=own | {"kv_eviction_report": True}).json()
    report = response["kv_transfer_params"]["kv_eviction"]
    assert report["evictions"] == evictions(server) - before
    assert report["logical_tokens"] == response["usage"]["total_tokens"] - 1
    budget = own.get("kv_eviction_budget", 128)
    if own.get("kv_eviction") == "none":
        assert report["held_tokens"] == report["logical_tokens"]
    else:
        assert budget < report["held_tokens"] <= budget + 16
    assert report["held_tokens"] + report["evicted_tokens"] == report["logical_tokens"]


def test_the_status_page_shows_running_requests_and_none_of_their_text(server):
    body = {"model": "tiny", "prompt": "SECRET " * 30, "max_tokens": 3000, "stream": True}
    with requests.post(server.url + "/v1/completions", json=body, stream=True, timeout=60) as call:
        lines, running = call.iter_lines(), []
        while not (running and running[0]["evictions"] > 1):
            next(lines)
            running = requests.get(server.url + "/kv_eviction/requests", timeout=60).json()
        text = requests.get(server.url + "/kv_eviction/status", timeout=60).text
    (shown,) = running
    assert 128 < shown["held_tokens"] <= 144 < shown["logical_tokens"]
    assert "SECRET" not in text + str(running)
    assert "KV cache eviction" in requests.get(server.url + "/kv_eviction", timeout=60).text


def test_settings_that_a_request_cannot_have_are_http_400(server):
    refused = complete(server, "e", vllm_xargs={"kv_eviction_budget": 129})
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert message.startswith("vllm_xargs.kv_eviction_budget: must be an integer above window (16)")


def test_whatever_its_routes_are_sent_it_answers(server):
    """No HTTP 500, nothing that hangs; ``python -m benchmarks.stress.any_request`` sends more."""
    # schemathesis takes seconds to import.
    from benchmarks.stress import any_request

    before = evictions(server)
    routes = any_request.ROUTES[:6]
    result = any_request.measure(server, routes, num_cases=24, number=0)
    assert any_request.is_good(result), [
        failure for route in result["routes"].values() for failure in route["failures"]
    ]
    for name in ("completions", "chat/completions", "responses", "messages"):
        statuses = result["routes"][f"/v1/{name}"]["statuses"]
        assert statuses[200] >= 2
        assert statuses[400] >= 2
    assert evictions(server) > before
