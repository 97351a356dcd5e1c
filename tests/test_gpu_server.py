"""The server benchmark without a server: what it refuses to report, and its model."""

import json
from argparse import Namespace

import pytest

from benchmarks.gpu import server, server_report
from vase_vllm.schedule import EvictionSchedule

OPTIONS = Namespace(input_len=100, output_len=1000, waves=2)
SCHEDULE = EvictionSchedule(budget=256, window=64)
# Prompts of 50 to 150 tokens evict at position 320 and every 64 positions until 1048.
LEAST_EVICTIONS = 8 * 12
MOST_BLOCKS = 4 * (2 + 20)


def run(**changes):
    result = {"concurrency": 4, "peak_blocks": MOST_BLOCKS, "blocks_left": 0, "preemptions": 0.0}
    load = {"completed": 8, "total_output_tokens": 8000}
    load |= {key: changes.pop(key) for key in list(changes) if key in load}
    return result | {"load": load} | changes


def check(result, schedule=SCHEDULE, num_evictions=LEAST_EVICTIONS):
    server.check_run(result, OPTIONS, schedule, num_evictions, state_blocks=2, block_size=16)


def test_a_right_run_passes():
    check(run())
    check(run(peak_blocks=10_000, preemptions=30.0), schedule=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(completed=7), "7 of 8 requests completed"),
        (dict(total_output_tokens=7999), "answers are cut off"),
        (dict(peak_blocks=0), "no block was seen in use"),
        (dict(blocks_left=3), "3 blocks are in use after"),
        (dict(peak_blocks=MOST_BLOCKS + 1), "89 blocks in use, 88 are the bound"),
        (dict(preemptions=9.0), "9 preemptions of 8 requests"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(changes, message):
    with pytest.raises(server.CheckFailedError, match=message):
        check(run(**changes))


@pytest.mark.parametrize("num_evictions", [0, LEAST_EVICTIONS - 1], ids=str)
def test_refuses_too_few_evictions(num_evictions):
    with pytest.raises(server.CheckFailedError, match=f"{num_evictions} evictions, at least 96"):
        check(run(), num_evictions=num_evictions)


@pytest.mark.parametrize(
    ("line", "is_error"),
    [
        ("(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:1] it broke", True),
        ("Traceback (most recent call last):", True),
        ("INFO 01-02 03:04:05 [core.py:1] on_error=raise", False),
        ("WARNING 01-02 03:04:05 [core.py:1] careful", False),
    ],
    ids=["error", "traceback", "info", "warning"],
)
def test_errors_in_the_log(line, is_error):
    assert bool(server.ERROR.search(f"INFO start\n{line}\n")) == is_error


def test_every_id_of_the_model_is_a_token(tmp_path):
    from transformers import AutoTokenizer

    config = server.write_model(tmp_path, server.TINY)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == config["vocab_size"] == 512
    assert tokenizer.decode([72, 105, 300]) == "Hiw300;"
    assert tokenizer.encode("Hi w300;") == list(b"Hi w300;")


def report(smoke):
    loads = [{key: float(10 * n) for key in server_report.COLUMNS.values()} for n in (1, 2, 4)]
    runs = [
        {"concurrency": 16, "load": load, "preemptions": n, "peak_blocks": n}
        for n, load in enumerate(loads)
    ]
    in_effect = dict.fromkeys(server_report.IN_EFFECT, "x")
    return {
        "smoke": smoke,
        "device": "a GPU",
        "date": "2026-01-01",
        "versions": {"vllm": "0"},
        "python": "3",
        "command": "python",
        "model": "model",
        "settings": {"input_len": 1, "output_len": 2, "window": 3, "rounds": 3},
        "servers": [{"policy": "full cache", "runs": [run], **in_effect} for run in runs],
    }


def test_medians_over_the_rounds(tmp_path):
    (row,) = server_report.cells(report(smoke=False))
    assert (row["output tokens/s"], row["range"]) == (20.0, (10.0, 40.0))
    assert (row["preemptions"], row["peak_blocks"]) == (2, 2)
    path = server_report.write(tmp_path, report(smoke=False))
    assert json.loads(path.with_suffix(".json").read_text())["cells"][0]["concurrency"] == 16
    assert "| full cache | 16 | 20 (10 to 40) | 20 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_smoke_run_has_no_numbers():
    text = server_report.markdown(report(smoke=True))
    assert "| full cache | 16 | - | - | - | - | - | - |" in text
    assert "no numbers" in text
