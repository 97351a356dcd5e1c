"""What running requests hold, for whoever asks a worker between two steps."""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from vase_vllm.layout.block_table_row import NEVER, RowHeader
from vase_vllm.layout.schedule import EvictionSchedule


def request_status(
    latest: SchedulerOutput, headers: dict[str, RowHeader], schedule: EvictionSchedule
) -> list[dict[str, Any]]:
    """The requests of a step, as they are after it, but for those that have ended since.

    Args:
        latest: the scheduler's message that started the step.
        headers: request id to the header of its block-table row.
        schedule: of the server.

    Returns:
        For each ``request_id`` its :meth:`EvictionSchedule.figures`, and the ``budget`` with the
        prompt that is kept; None for a request that does not evict.
    """
    cached = latest.scheduled_cached_reqs
    starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    starts |= {new.req_id: new.num_computed_tokens for new in latest.scheduled_new_reqs}
    result = []
    for request_id, num_tokens in latest.num_scheduled_tokens.items():
        header = headers.get(request_id)
        if header is None:
            continue
        own = schedule.with_budget(header.budget)
        last = starts[request_id] + num_tokens - 1
        budget = None if header.first == NEVER else header.budget
        figures = own.figures(last, header.first)
        result.append({"request_id": request_id, **figures, "budget": budget})
    return result
