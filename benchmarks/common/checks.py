"""Whether a run was what it must be. A run that was not has no speed and no accuracy."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.common.policy import Policy
from benchmarks.common.server import ERROR
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.schedule import EvictionSchedule


@dataclass(frozen=True)
class Observed:
    """What a run was asked, and what came of it.

    Attributes:
        load: the result of ``vllm bench serve``, with its details.
        requested: tokens of each output that were asked for.
        num_opted_out: requests that asked for the full cache, the last ones of the lists.
        stops: token ids that end an output before that.
        evictions: of the server's count; None if it counts none.
        series: samples of the server during the run, see ``monitor.Monitor``.
        blocks_left: KV cache blocks in use after all requests.
        log: what the server has printed.
    """

    load: dict[str, Any]
    requested: list[int]
    stops: tuple[int, ...]
    evictions: int | None
    series: dict[str, list[float]]
    blocks_left: int
    log: str
    num_opted_out: int = 0


def problems(
    run: Observed, policy: Policy, block_size: int, group_size: int, must_evict: bool = False
) -> list[str]:
    """Everything that is wrong with a run; an empty list is a run that counts.

    Args:
        block_size: token slots of a KV cache block.
        group_size: query heads per KV head.
        must_evict: whether a run under eviction without an eviction is wrong.
    """
    found = load_problems(run.load, run.requested, run.stops)
    if not max(run.series["blocks"]):
        found.append("no block was seen in use: raise --output-len")
    if run.blocks_left:
        found.append(f"{run.blocks_left} blocks were not given back")
    if error := ERROR.search(run.log):
        found.append(f"the server logged an error: {error[0]}")
    lengths = list(zip(run.load["input_lens"], run.load["output_lens"], strict=True))
    evicting = lengths[: len(lengths) - run.num_opted_out]
    preempted = run.series["preemptions"][-1] > 0
    found += eviction_problems(policy.schedule, evicting, run.evictions, preempted)
    if policy.schedule is None:
        return found
    if must_evict and run.evictions == 0:
        found.append("nothing was evicted: raise --output-len")
    num_state_blocks = RingLayout(policy.window, group_size, block_size).num_blocks
    longest = max((prompt for prompt, _ in evicting), default=0)
    bound = most_blocks(policy.schedule, num_state_blocks, longest, block_size)
    opted_out = lengths[len(evicting) :]
    bound = max([bound, *(cdiv(prompt + output, block_size) for prompt, output in opted_out)])
    samples = zip(run.series["blocks"], run.series["running"], strict=True)
    if over := [blocks for blocks, running in samples if blocks > running * bound]:
        found.append(f"{max(over):.0f} blocks held, more than {bound} for each running request")
    return found


def load_problems(
    load: dict[str, Any], requested: list[int], stops: tuple[int, ...] = ()
) -> list[str]:
    """What is wrong with the requests themselves and with the lengths of their outputs."""
    found = []
    if load["completed"] != len(requested):
        found.append(f"{load['completed']} of {len(requested)} requests completed")
    if stops:
        if max(load["output_lens"]) > max(requested) or min(load["output_lens"]) < 1:
            found.append("an output is empty or longer than asked for")
    elif load["output_lens"] != requested:
        wrong = sum(a != b for a, b in zip(load["output_lens"], requested, strict=False))
        found.append(f"{wrong} outputs are not as long as asked for")
    return found


def eviction_problems(
    schedule: EvictionSchedule | None,
    lengths: Iterable[tuple[int, int]],
    evictions: int | None,
    preempted: bool = False,
) -> list[str]:
    """Whether the server's count of evictions is what the schedule says.

    Args:
        lengths: of the prompt and the output of each request, in tokens.
        preempted: whether requests were: they recompute their output, and evict again meanwhile.
    """
    if schedule is None:
        return [] if evictions is None else ["the full cache's server counts evictions"]
    expected = sum(schedule.evictions(*pair)[0] for pair in lengths)
    if evictions == expected or (preempted and evictions is not None and evictions > expected):
        return []
    return [f"{evictions} evictions, {expected} expected"]


def settings_problems(settings: dict[str, str]) -> list[str]:
    """What is switched off on a GPU that vLLM has on by default, so that no number counts."""
    if settings["device"] != "cuda":
        return []
    graphs, is_async = settings["cuda_graphs"], settings["async_scheduling"]
    if settings["enforce_eager"] == "True" or graphs == "NONE" or is_async != "True":
        return [f"CUDA graphs are {graphs}, async_scheduling is {is_async}"]
    return []


def most_blocks(
    schedule: EvictionSchedule, num_state_blocks: int, input_len: int, block_size: int
) -> int:
    """Most blocks that one request may hold under eviction, whatever the policy.

    A prompt is held whole until its first eviction, and for the length of a step its blocks are
    held twice: to or from the prefix cache.
    """
    num_token_blocks = cdiv(schedule.first_eviction(input_len), block_size)
    return num_state_blocks + num_token_blocks + input_len // block_size
