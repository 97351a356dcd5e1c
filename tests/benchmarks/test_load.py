"""A load by two clients, which send requests with different settings, is judged as one."""

import pytest

from benchmarks.common.load import by_client, merged
from benchmarks.common.workload import SEED, draw_requests
from benchmarks.serving.suites import MIXED, MIXED_OPT_OUT

FIRST = {
    "completed": 2,
    "failed": 0,
    "total_input_tokens": 30,
    "total_output_tokens": 12,
    "input_lens": [10, 20],
    "output_lens": [2, 10],
    "start_times": [100.0, 101.0],
    "latencies": [3.0, 10.0],
    "ttfts": [1.0, 1.0],
    "itls": [[2.0], [1.0] * 9],
    "errors": ["", ""],
    "duration": 11.0,
}
SECOND = {
    "completed": 1,
    "failed": 0,
    "total_input_tokens": 5,
    "total_output_tokens": 1,
    "input_lens": [5],
    "output_lens": [1],
    "start_times": [99.0],
    "latencies": [4.0],
    "ttfts": [4.0],
    "itls": [[]],
    "errors": [""],
    "duration": 4.0,
}


def test_one_client_is_reported_as_it_is():
    assert merged([FIRST]) is FIRST


def test_two_clients_are_merged():
    load = merged([FIRST, SECOND])
    assert (load["completed"], load["total_output_tokens"]) == (3, 13)
    assert load["input_lens"] == [10, 20, 5]
    # From the first start of all, at 99, to the last end, at 111.
    assert load["duration"] == pytest.approx(12)
    assert load["output_throughput"] == pytest.approx(13 / 12)
    assert load["median_ttft_ms"] == pytest.approx(1000)
    # 2 s and 1 s per token; an output of one token has no time per token.
    assert load["median_tpot_ms"] == pytest.approx(1500)
    assert load["p99_itl_ms"] == pytest.approx(1910)


def test_each_client_sends_requests_of_one_kind():
    requests = draw_requests(MIXED_OPT_OUT, SEED)
    evicting, opted_out = by_client(requests)
    assert [r.opts_out for r in evicting + opted_out] == [False] * 80 + [True] * 32
    assert min(len(r.prompt) for r in opted_out) > max(len(r.prompt) for r in evicting)
    assert by_client(draw_requests(MIXED, SEED)) == [draw_requests(MIXED, SEED)]
    # They are the same requests, but for their settings.
    assert [r.prompt for r in requests] == [r.prompt for r in draw_requests(MIXED, SEED)]
