"""What a worker says of its running requests, from the scheduler's messages alone."""

from types import SimpleNamespace

from vase_vllm.layout.block_table_row import NEVER, RowHeader
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.worker.request_status import request_status

SCHEDULE = EvictionSchedule(budget=96, window=16)


def step(new=(), cached=()):
    """A message; ``new`` and ``cached`` are triples of request, computed and scheduled tokens."""
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, num_computed_tokens=computed) for name, computed, _ in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _, _ in cached],
            num_computed_tokens=[computed for _, computed, _ in cached],
        ),
        num_scheduled_tokens={name: number for name, _, number in [*new, *cached]},
    )


def test_requests_of_a_step():
    headers = {
        "new": RowHeader(112, 1, 96, 0),
        "evicts": RowHeader(112, 1, 96, 0),
        "about to": RowHeader(112, 1, 96, 0),
        "keeps": RowHeader(152, 1, 136, 40),
        "opted out": RowHeader(NEVER, 1, 200, 100),
    }
    cached = [("evicts", 130, 1), ("about to", 111, 1), ("keeps", 200, 1), ("opted out", 5000, 1)]
    latest = step(new=[("new", 32, 18), ("ended since", 0, 7)], cached=cached)
    rows = {row.pop("request_id"): row for row in request_status(latest, headers, SCHEDULE)}
    names = "logical_tokens", "held_tokens", "evictions", "budget"
    assert {name: tuple(row[key] for key in names) for name, row in rows.items()} == {
        "new": (50, 50, 0, 96),
        "evicts": (131, 99, 2, 96),
        "about to": (112, 112, 0, 96),
        "keeps": (201, 137, 4, 136),
        "opted out": (5001, 5001, 0, None),
    }


def test_nothing_runs():
    assert request_status(step(), {}, SCHEDULE) == []
