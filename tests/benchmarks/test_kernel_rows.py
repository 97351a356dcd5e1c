"""The kernel benchmark's file: what is measured once, told apart, refused; and its page."""

import math
import time

import pytest
import torch

from benchmarks.common.clock import Clock, OutOfTimeError
from benchmarks.common.provenance import source_digest
from benchmarks.common.results import Rows
from benchmarks.kernels import correctness
from benchmarks.kernels.eviction import measure
from benchmarks.kernels.eviction_report import amortised, markdown, number

HEADER = {"smoke": False, "device": "a GPU", "torch": "2", "triton": "3", "cuda": "13"}
HEADER |= {"python": "3.11", "shape": "a shape"}
ENDLESS, OVER = Clock(None, 0.0), Clock(0, time.monotonic() - 1)


def key(kernels="new", **more):
    return {"kind": "eviction", "budget": 64, "due": 1, "kernels": kernels} | more


def test_a_row_is_measured_once_for_each_state_of_the_kernels(tmp_path):
    measured = []

    def function():
        measured.append(1)
        return {"fused": float(len(measured))}

    path = tmp_path / "rows.json"
    assert measure(Rows(path, HEADER), key(), function, ENDLESS)["fused"] == 1.0
    # It is in the file at once, and a later call finds it there, even one without time.
    again = Rows(path, HEADER)
    assert measure(again, key(), function, OVER)["fused"] == 1.0
    assert measure(again, key("newer"), function, ENDLESS)["fused"] == 2.0
    assert measure(again, key(due=2), function, ENDLESS)["fused"] == 3.0
    with pytest.raises(OutOfTimeError):
        measure(again, key(due=4), function, OVER)
    assert len(Rows(path, HEADER).content["rows"]) == 3
    with pytest.raises(ValueError, match="torch = 2, not 3: choose another --output"):
        Rows(path, HEADER | {"torch": "3"})


def test_shapes_that_are_right_are_not_compared_again(tmp_path, monkeypatch):
    outcomes = {"one": {"wrong_heads": 0, "ring_is_right": True}}
    outcomes["two"] = {"wrong_heads": 3, "ring_is_right": True}
    outcomes["three"] = {"wrong_heads": 0, "ring_is_right": False}
    compared = []

    def wrong_parts(shape, device):
        compared.append(shape)
        return outcomes[shape]

    monkeypatch.setattr(
        correctness, "correctness_shapes", lambda: {name: name for name in outcomes}
    )
    monkeypatch.setattr(correctness, "wrong_parts", wrong_parts)
    results = Rows(tmp_path / "rows.json", HEADER)
    for _ in range(2):
        failed = list(correctness.check(results, None, ENDLESS, {"kernels": "new"}))
        assert failed == ["two", "three"]
    assert compared == ["one", "two", "three", "two", "three"]
    assert "**WRONG: two, three**" in markdown({**results.content, "kernels": "new", "command": ""})


def test_an_error_of_one_shape_is_its_verdict_alone(tmp_path, monkeypatch):
    def wrong_heads(shape, device, num_splits):
        if shape == "bad":
            raise ValueError("a launch failed")
        return 0

    monkeypatch.setattr(correctness, "wrong_heads", wrong_heads)
    monkeypatch.setattr(correctness, "ring_is_right", lambda shape, device: True)
    monkeypatch.setattr(
        correctness, "correctness_shapes", lambda: {name: name for name in ("bad", "good")}
    )
    results = Rows(tmp_path / "rows.json", HEADER)
    stamp = {"kernels": "new"}
    assert list(correctness.check(results, None, ENDLESS, stamp)) == ["bad"]
    assert results.find(shape="bad")["error"] == "ValueError: a launch failed"
    assert correctness.is_right(results.find(shape="good"))
    assert "**WRONG: bad**" in markdown({**results.content, "kernels": "new", "command": ""})


def test_processes_compare_side_by_side():
    device = torch.device("cpu")
    shapes = {name: None for name in ("one", "two")}
    # What a process is given it cannot compare: each says so for itself.
    rows = dict(correctness.compared(shapes, device, ENDLESS, 2))
    assert {name: "error" in row for name, row in rows.items()} == {"one": True, "two": True}
    with pytest.raises(OutOfTimeError):
        list(correctness.compared(shapes, device, OVER, 2))


def test_a_change_of_a_source_changes_its_digest(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = source_digest(tmp_path)
    assert source_digest(tmp_path) == first
    (tmp_path / "a.py").write_text("2")
    assert source_digest(tmp_path) != first


def test_the_page_says_what_was_not_compared_and_leaves_out_other_kernels():
    row = {"floor": 1.0, "authors": "out of memory", "R-KV's rule": 6.0, "date": "2026-01-01"}
    row |= {"distinct": 2.5, "random": 1.0, "streaming": math.nan}
    rows = [key() | row | {"fused": 2.0}, key("old") | row | {"fused": 3.0}]
    page = markdown({**HEADER, "rows": rows, "kernels": "new", "command": "python"})
    assert "| 64 | 1 | 2 | 1 | 50 % | out of memory | - | not timed | 6 | 2.5 | 1 | - |" in page
    assert "| 64 | 1 | 3 |" not in page
    assert "**not compared (--skip-check)**" in page


def test_a_step_has_its_share_of_the_evictions():
    times = {1: 4.0, 2: 6.0, 16: None}
    step = {"ring": 1.0, "decode": 10.0}
    # A quarter of an eviction of one; two at once; sixteen did not fit.
    assert amortised(step | {"batch": 16}, times) == (1.0, 0.2)
    assert amortised(step | {"batch": 128}, times) == (6.0, 0.7)
    assert amortised(step | {"batch": 1024}, times) == (None, None)
    assert amortised(step | {"batch": 128, "decode": None}, times) == (6.0, None)


def test_cells():
    assert [number(value) for value in (None, math.nan, 1.2345, "a|b")] == [
        "no memory",
        "-",
        "1.23",
        "a/b",
    ]
