"""What is sent to a server's routes, and what is said of the answers."""

import json

import pytest

SAID = {
    "date": "2026-01-01",
    "machine": {"processor": "p", "cores": 2},
    "command": "c",
    "seconds": 60.0,
    "blocks_left": 0,
    "healthy": True,
    "evictions": 7,
}
GOOD = {"statuses": {200: 3, 400: 1}, "unanswered": 0, "seconds": 2.0, "longest": 1.0}


@pytest.fixture(scope="module")
def any_request():
    # schemathesis takes seconds to import.
    from benchmarks.stress import any_request

    return any_request


def test_a_body_is_right_but_for_a_few_fields(any_request):
    body = {"temperature": 0.5, "n": 900, "prompt": "p", "\x80": {}, "max_tokens": None}
    right = {"prompt": "right"}
    got = any_request.fitted(body, right, [], {})
    limits = {"max_tokens": 60, "max_completion_tokens": 60, "max_output_tokens": 60}
    assert got == right | limits | {"model": "tiny"}
    # Of max_tokens, n, prompt, temperature.
    got = any_request.fitted(body, right, [1, 7], {"kv_eviction": "none"})
    assert got == right | limits | {
        "model": "tiny",
        "temperature": 0.5,
        "n": 3,
        "vllm_xargs": {"kv_eviction": "none"},
    }
    assert any_request.fitted(body, None, [], {})["\x80"] == {}
    assert any_request.fitted(b"\x80", right, [1], {}) == b"\x80"


@pytest.mark.parametrize(
    ("route", "whole"),
    [
        ({"failures": ["what"]}, {}),
        ({}, {"blocks_left": 1}),
        ({}, {"healthy": False}),
    ],
)
def test_what_went_wrong_is_told(any_request, route, whole):
    good = SAID | {"routes": {"/v1/x": GOOD | {"failures": []}}}
    assert any_request.is_good(good)
    assert "4 cases in 1.0 minutes: **all answered, no HTTP 500**" in any_request.page(good)
    assert "| `/v1/x` | 200: 3, 400: 1 | 4 | 0.50 | 1.0 | 0 |" in any_request.page(good)
    bad = SAID | whole | {"routes": {"/v1/x": GOOD | {"failures": []} | route}}
    assert not any_request.is_good(bad)
    assert "NOT as it must be" in any_request.page(json.loads(json.dumps(bad)))
