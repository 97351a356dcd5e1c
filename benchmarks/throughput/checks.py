"""Whether a run was what it must be. A run that was not has no speed."""

from typing import Any

import requests
from vllm.utils.math_utils import cdiv

from benchmarks.throughput.suites import Policy
from vase_vllm.ring import RingLayout
from vase_vllm.schedule import EvictionSchedule
from vase_vllm.server import Server


def evictions_so_far(server: Server, policy: Policy) -> int | None:
    """The server's own count; None if it has none, as a vLLM without eviction must."""
    try:
        return server.eviction_stats()["evictions"]
    except (requests.RequestException, KeyError, TypeError):
        return None


def evictions_of(schedule: EvictionSchedule, input_len: int, output_len: int) -> int:
    """Evictions that one request causes if it is never preempted."""
    # The last token of an answer is never read.
    last = input_len + output_len - 2
    first = schedule.first_eviction(input_len)
    return 0 if last < first else (last - first) // schedule.window + 1


def blocks_of(policy: Policy, input_len: int, block_size: int, group_size: int) -> int:
    """Most blocks that one request may hold under eviction, whatever the policy."""
    assert policy.budget is not None
    schedule = EvictionSchedule(policy.budget, policy.window)
    ring = RingLayout(policy.window, group_size, block_size)
    # A long prompt is held whole until its first eviction.
    num_slots = schedule.bound
    if input_len > policy.budget:
        num_slots = schedule.first_eviction(input_len)
    return ring.num_blocks + cdiv(num_slots, block_size)


def problems(
    load: dict[str, Any],
    requested: list[int],
    policy: Policy,
    evictions: int | None,
    series: dict[str, list[float]],
    blocks_left: float,
    block_size: int,
    group_size: int,
) -> list[str]:
    """Everything that is wrong with a run; an empty list is a run that counts."""
    found = []
    if load["completed"] != len(requested):
        found.append(f"{load['completed']} of {len(requested)} requests completed")
    if load["output_lens"] != requested:
        wrong = sum(a != b for a, b in zip(load["output_lens"], requested, strict=False))
        found.append(f"{wrong} answers are not as long as asked for")
    if blocks_left:
        found.append(f"{blocks_left:.0f} blocks were not given back")
    if policy.budget is None:
        if evictions is not None:
            found.append("the full cache's server counts evictions")
        return found
    schedule = EvictionSchedule(policy.budget, policy.window)
    lengths = list(zip(load["input_lens"], load["output_lens"], strict=True))
    expected = sum(evictions_of(schedule, *pair) for pair in lengths)
    preempted = series["preemptions"][-1] > 0
    # A preempted sequence computes its answer again, and evicts again on the way.
    if evictions is None or evictions < expected or (evictions > expected and not preempted):
        found.append(f"{evictions} evictions, {expected} expected")
    longest = max(load["input_lens"])
    # For the length of a step a prompt's blocks are held twice: to or from the prefix cache.
    bound = blocks_of(policy, longest, block_size, group_size) + longest // block_size
    over = [b for b, n in zip(series["blocks"], series["running"], strict=True) if b > n * bound]
    if over:
        found.append(f"{max(over):.0f} blocks held, more than {bound} for each running request")
    return found
