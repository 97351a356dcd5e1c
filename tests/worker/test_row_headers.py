"""The host's knowledge of the rows' headers, under the row numbering of both model runners."""

from types import SimpleNamespace

import numpy as np

from vase_vllm.layout.block_table_row import BlockTableRow
from vase_vllm.worker.row_headers import RowHeaders

GROUP = 1


def message(new=(), finished=()):
    """A scheduler's message; ``new`` is pairs of (request, first eviction)."""
    requests = [
        SimpleNamespace(req_id=name, block_ids=((5, 6), (first, 99, 40, 7, 1, 2)))
        for name, first in new
    ]
    return SimpleNamespace(scheduled_new_reqs=requests, finished_req_ids=set(finished))


def firsts(known, common):
    """Where the rows' first evictions are."""
    return known.of_rows(common)[:, BlockTableRow.FIRST].tolist()


class RunnerV2:
    """Requests keep an index in the runner's table while they run."""

    def __init__(self):
        self.req_states = SimpleNamespace(req_id_to_index={})

    def rows(self, indices, num_rows=None):
        return SimpleNamespace(
            num_reqs=len(indices) if num_rows is None else num_rows,
            req_idx=np.array(indices, dtype=np.intp),
        )


class RunnerV1:
    """Row i is whatever request the input batch has there."""

    def __init__(self):
        self.input_batch = SimpleNamespace(req_ids=[])

    def rows(self, names, num_rows=None):
        self.input_batch.req_ids = list(names)
        return SimpleNamespace(num_reqs=len(names) if num_rows is None else num_rows, req_idx=None)


def test_a_header_is_whole():
    runner = RunnerV1()
    known = RowHeaders(runner, max_num_requests=2)
    known.observe(message(new=[("a", 48)]), GROUP)
    assert known.of_rows(runner.rows("a", num_rows=2)).tolist() == [[48, 99, 40, 7], [0, 0, 0, 0]]


def test_v2_rows_come_by_index():
    runner = RunnerV2()
    known = RowHeaders(runner, max_num_requests=4)
    known.observe(message(new=[("a", 48), ("b", 96)]), GROUP)
    runner.req_states.req_id_to_index = {"a": 3, "b": 0}
    assert firsts(known, runner.rows([3, 0])) == [48, 96]
    assert firsts(known, runner.rows([0, 3])) == [96, 48]


def test_v2_index_reused_after_a_request_finishes():
    runner = RunnerV2()
    known = RowHeaders(runner, max_num_requests=2)
    known.observe(message(new=[("a", 48), ("b", 96)]), GROUP)
    runner.req_states.req_id_to_index = {"a": 0, "b": 1}
    firsts(known, runner.rows([0, 1]))
    known.observe(message(new=[("c", 152)], finished=["a"]), GROUP)
    runner.req_states.req_id_to_index = {"b": 1, "c": 0}
    assert firsts(known, runner.rows([0, 1])) == [152, 96]


def test_v2_preempted_request_comes_back_with_another_index():
    runner = RunnerV2()
    known = RowHeaders(runner, max_num_requests=2)
    known.observe(message(new=[("a", 48)]), GROUP)
    runner.req_states.req_id_to_index = {"a": 0}
    firsts(known, runner.rows([0]))
    known.observe(message(new=[("b", 96), ("a", 48)]), GROUP)
    runner.req_states.req_id_to_index = {"b": 0, "a": 1}
    assert firsts(known, runner.rows([0, 1])) == [96, 48]


def test_v2_two_builders_ask_in_one_step():
    runner = RunnerV2()
    known = RowHeaders(runner, max_num_requests=2)
    known.observe(message(new=[("a", 48)]), GROUP)
    runner.req_states.req_id_to_index = {"a": 1}
    assert firsts(known, runner.rows([1])) == [48]
    assert firsts(known, runner.rows([1])) == [48]


def test_v2_padding_rows_are_0():
    runner = RunnerV2()
    known = RowHeaders(runner, max_num_requests=4)
    known.observe(message(new=[("a", 48)]), GROUP)
    runner.req_states.req_id_to_index = {"a": 2}
    assert firsts(known, runner.rows([2], num_rows=4)) == [
        48,
        0,
        0,
        0,
    ]


def test_v1_rows_that_move():
    runner = RunnerV1()
    known = RowHeaders(runner, max_num_requests=4)
    known.observe(message(new=[("a", 48), ("b", 96), ("c", 152)]), GROUP)
    assert firsts(known, runner.rows("abc")) == [48, 96, 152]
    assert firsts(known, runner.rows("cab")) == [152, 48, 96]
    known.observe(message(finished=["a"]), GROUP)
    assert firsts(known, runner.rows("cb")) == [152, 96]


def test_v1_padding_and_dummy_rows_are_0():
    runner = RunnerV1()
    known = RowHeaders(runner, max_num_requests=4)
    known.observe(message(new=[("a", 48)]), GROUP)
    assert firsts(known, runner.rows("a", num_rows=3)) == [
        48,
        0,
        0,
    ]
    assert firsts(known, runner.rows([], num_rows=2)) == [0, 0]
    known.observe(message(finished=["a"]), GROUP)
    assert firsts(known, runner.rows("a")) == [0]
