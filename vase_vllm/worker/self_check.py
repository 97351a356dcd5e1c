"""Proof, before the first request, that evictions happen on this model, backend and model runner.

One dummy sequence goes through real steps: a prompt up to its first eviction, then one token, in
front of which it evicts. What lies in its pages before and after must be what an eviction leaves.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from vllm import SamplingParams
from vllm.logger import init_logger
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.errors import EvictionError
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.block_table_row import BlockTableRow, RowHeader
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.worker.counters import EvictionCounters
from vase_vllm.worker.step import StepContext

logger = init_logger("vllm.vase_vllm")

REQUEST_ID = "_eviction_self_check_"
Steps = tuple[Callable[[SchedulerOutput], Any], Callable[[None], Any]]
"""A worker's ``execute_model`` and ``sample_tokens``."""


def check_evictions(steps: Steps, context: StepContext, kv_cache_config: KVCacheConfig) -> None:
    """Evict from a dummy sequence, and look at its pages.

    The blocks that it writes are in nobody's use: the scheduler does not exist yet.

    Raises:
        EvictionError: no eviction happened, or another than was asked for.
    """
    start = time.perf_counter()
    sequence = _DummySequence(context, kv_cache_config)
    context.counters = EvictionCounters(context.counters.num_layers)
    try:
        for output in sequence.prefill():
            _run(steps, output)
        before = sequence.keys()
        _run(steps, sequence.next_token())
        after = sequence.keys()
        evicted = context.counters.as_dict()
    finally:
        _run(steps, sequence.finish())
        context.counters = EvictionCounters(context.counters.num_layers)
    schedule = sequence.schedule
    counted = evicted["evictions"], evicted["evicted_tokens"]
    if counted != (1, schedule.window):
        raise _failure(context.config, f"{counted[0]} evictions of {counted[1]} tokens happened")
    for layer, keys in before.items():
        if reason := wrong_survivors(schedule, keys, after[layer]):
            raise _failure(context.config, f"in layer {layer} {reason}")
    logger.info(
        "KV eviction: the self-check took %.2f s: %s evicted %d of %d tokens from %d layers.",
        time.perf_counter() - start,
        context.config.policy.name,
        schedule.window,
        schedule.bound,
        len(before),
    )


def wrong_survivors(
    schedule: EvictionSchedule, before: torch.Tensor, after: torch.Tensor
) -> str | None:
    """Why a sequence's keys are not what one eviction and one new token leave, or None.

    Args:
        before: [H, T + W, D], in the order of their slots, in front of the eviction.
        after: the same slots after it and after the next token.
    """
    same = _bits(after[:, : schedule.budget, None]) == _bits(before[:, None])
    # [H, T, T + W]: which of the keys before is which after. Equal tokens may have equal keys.
    same = same.all(dim=-1)
    if not same.any(dim=2).all():
        return "tokens were kept that the sequence had not"
    found = same.any(dim=1)
    if not found[:, schedule.budget :].all():
        return "tokens of the window were evicted"
    if (found.sum(dim=1) < schedule.budget).any():
        return "tokens were kept twice"
    if (_bits(after[:, schedule.budget]) == _bits(before[:, schedule.budget])).all():
        return "the next token was not written behind the survivors"
    return None


def _bits(keys: torch.Tensor) -> torch.Tensor:
    """Keys as integers: an eviction moves them bit by bit, whatever they are."""
    return keys.view({2: torch.int16, 4: torch.int32}[keys.element_size()])


def _failure(config: EvictionConfig, reason: str) -> EvictionError:
    return EvictionError(
        f"--kv-eviction {config.policy.name}: the self-check failed: {reason}, so outputs would be "
        "wrong; remove --kv-eviction and report this, or start with "
        "--kv-eviction-config.self_check false"
    )


def _run(steps: Steps, output: SchedulerOutput) -> None:
    """One step, as an engine runs it."""
    execute_model, sample_tokens = steps
    if execute_model(output) is None and output.total_num_scheduled_tokens:
        sample_tokens(None)


def _smallest_budget(config: EvictionConfig) -> int:
    """Of the check's sequence: what a request may set, so that it takes no time."""
    try:
        return config.changed(budget=min(config.budget, 2 * config.window)).budget
    except ValueError:
        return config.budget


class _DummySequence:
    """A sequence of arbitrary tokens that evicts once, in the messages of a scheduler."""

    def __init__(self, context: StepContext, kv_cache_config: KVCacheConfig) -> None:
        self._context = context
        self._kv_cache_config = kv_cache_config
        self.schedule = context.config.schedule.with_budget(_smallest_budget(context.config))
        # All of it is prompt, and one token is never computed: nothing is sampled.
        self._num_tokens = self.schedule.bound + 2
        self._block_ids = self._allocate()

    def _allocate(self) -> tuple[list[int], ...]:
        """Block-table rows of all groups, as the block managers would make them."""
        next_block, rows = 1, []
        for group in self._kv_cache_config.kv_cache_groups:
            spec = group.kv_cache_spec
            evicts = isinstance(spec, EvictionSpec)
            if evicts:
                num_blocks = spec.num_blocks(self.schedule.bound)
            else:
                num_blocks = cdiv(self._num_tokens, spec.block_size)
            header = RowHeader(self.schedule.bound, 0, self.schedule.budget, kept=0)
            row = list(range(next_block, next_block + num_blocks))
            rows.append([*header, *row] if evicts else row)
            next_block += num_blocks
        if next_block > self._kv_cache_config.num_blocks:
            raise _failure(
                self._context.config,
                f"it needs {next_block} KV cache blocks of {self._kv_cache_config.num_blocks}",
            )
        return tuple(rows)

    def prefill(self) -> list[SchedulerOutput]:
        """Steps up to the first eviction, in chunks as large as a step may be."""
        largest = self._context.vllm_config.scheduler_config.max_num_batched_tokens
        starts = range(0, self.schedule.bound, largest)
        return [self._chunk(start, min(start + largest, self.schedule.bound)) for start in starts]

    def next_token(self) -> SchedulerOutput:
        """The step in front of which the sequence evicts."""
        return self._chunk(self.schedule.bound, self.schedule.bound + 1)

    def finish(self) -> SchedulerOutput:
        """The message that the sequence has ended."""
        output = SchedulerOutput.make_empty()
        output.finished_req_ids = {REQUEST_ID}
        return output

    def keys(self) -> dict[int, torch.Tensor]:
        """Layer index to the keys in the sequence's slots: [H, T + W, D], on the host."""
        blocks = {}
        for group, row in zip(self._kv_cache_config.kv_cache_groups, self._block_ids, strict=True):
            if isinstance(group.kv_cache_spec, EvictionSpec):
                own = row[BlockTableRow.NUM_HEADER :]
                blocks.update(dict.fromkeys(group.layer_names, own))
        found = {}
        for path in self._context.paths:
            for index, layer in path.layers.items():
                of_layer = torch.tensor(blocks[layer.layer_name], device=layer.kv_cache.device)
                keys = path.page_layout.keys(layer.kv_cache, of_layer).transpose(0, 1).cpu()
                found[index] = keys.flatten(1, 2)[:, : self.schedule.bound]
        return found

    def _chunk(self, start: int, stop: int) -> SchedulerOutput:
        """The message for a step that computes the tokens from ``start`` to ``stop``."""
        vocab_size = self._context.vllm_config.model_config.get_vocab_size()
        tokens = [index % vocab_size for index in range(self._num_tokens)]
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = {REQUEST_ID: stop - start}
        output.total_num_scheduled_tokens = stop - start
        if start == 0:
            params = SamplingParams(temperature=0, max_tokens=1)
            request = Request(REQUEST_ID, tokens, params, None)
            new = NewRequestData.from_request(request, self._block_ids, prefill_token_ids=tokens)
            output.scheduled_new_reqs = [new]
        else:
            cached = CachedRequestData.make_empty()
            cached.req_ids = [REQUEST_ID]
            cached.new_token_ids = [tokens[start:stop]]
            cached.new_block_ids = [None]
            cached.num_computed_tokens = [start]
            cached.num_output_tokens = [0]
            output.scheduled_cached_reqs = cached
        return output
