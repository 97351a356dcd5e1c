"""Whether a run was what it must be. A run that was not has no speed."""

from typing import Any

import requests
from vllm.utils.math_utils import cdiv

from benchmarks.serving.suites import Policy
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.server import Server


def evictions_so_far(server: Server, policy: Policy) -> int | None:
    """The server's own count; None if it has none, as a vLLM without eviction must."""
    try:
        return server.eviction_stats()["evictions"]
    except (requests.RequestException, KeyError, TypeError):
        return None


def most_blocks(
    schedule: EvictionSchedule, num_state_blocks: int, input_len: int, block_size: int
) -> int:
    """Most blocks that one request may hold under eviction, whatever the policy.

    A prompt is held whole until its first eviction, and for the length of a step its blocks are
    held twice: to or from the prefix cache.
    """
    num_token_blocks = cdiv(schedule.first_eviction(input_len), block_size)
    return num_state_blocks + num_token_blocks + input_len // block_size


def problems(
    load: dict[str, Any],
    requested: list[int],
    stops: tuple[int, ...],
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
    if stops:
        if max(load["output_lens"]) > max(requested) or min(load["output_lens"]) < 1:
            found.append("an answer is empty or longer than asked for")
    elif load["output_lens"] != requested:
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
    expected = sum(schedule.evictions(*pair)[0] for pair in lengths)
    preempted = series["preemptions"][-1] > 0
    # A preempted sequence computes its answer again, and evicts again on the way.
    if evictions is None or evictions < expected or (evictions > expected and not preempted):
        found.append(f"{evictions} evictions, {expected} expected")
    longest = max(load["input_lens"])
    num_state_blocks = RingLayout(policy.window, group_size, block_size).num_blocks
    bound = most_blocks(schedule, num_state_blocks, longest, block_size)
    over = [b for b, n in zip(series["blocks"], series["running"], strict=True) if b > n * bound]
    if over:
        found.append(f"{max(over):.0f} blocks held, more than {bound} for each running request")
    return found
