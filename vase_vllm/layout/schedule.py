"""When a sequence evicts and where its tokens lie: a closed form, without counters.

A sequence is described by two numbers, its budget and the position ``first`` of its first eviction,
which follow from the length of its prompt. Everything else is a pure function of these and a
position, so the scheduler and the workers agree without exchanging messages, a preempted sequence
that is recomputed lies exactly where it lay, and there is no state to go stale.

A dense prefill evicts nothing. From then on a sequence evicts whenever its cached length becomes
``budget + k * window`` for a whole k >= 1; the first time, that drops everything above the budget
at once. A bounded prefill evicts from the prompt as from an output, so that no sequence ever caches
more than ``budget + window`` tokens, and no number depends on where a prompt ends. A prompt that is
kept is held beside the budget: the sequence's own budget is the sum of both. Evictions run just
before the step of the position that needs the room.
"""

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from vase_vllm.layout.arithmetic import cdiv

if TYPE_CHECKING:
    import numpy as np
    import torch

Array = TypeVar("Array", int, "np.ndarray", "torch.Tensor")


@dataclass(frozen=True)
class EvictionSchedule:
    """Closed form of the slots and evictions of a sequence.

    Attributes:
        budget: tokens cached right after an eviction (T).
        window: tokens between evictions (W).
        bounded_prefill: whether the prompt is evicted from while it is computed.
        keeps_prompt: whether the budget is that of the output alone, and all of the prompt is held
            beside it. What a sequence holds then depends on its prompt; see :meth:`for_prompt`.
    """

    budget: int
    window: int
    bounded_prefill: bool = False
    keeps_prompt: bool = False

    def for_prompt(self, num_prompt_tokens: int) -> "EvictionSchedule":
        """The schedule of a sequence, whose budget includes the prompt that it keeps.

        >>> EvictionSchedule(budget=1024, window=64, keeps_prompt=True).for_prompt(100).bound
        1188
        """
        kept = num_prompt_tokens if self.keeps_prompt else 0
        return self.with_budget(self.budget + kept)

    def with_budget(self, budget: int) -> "EvictionSchedule":
        """The schedule of a sequence that holds ``budget`` tokens right after an eviction."""
        return replace(self, budget=budget, keeps_prompt=False)

    @property
    def bound(self) -> int:
        """Most tokens that a sequence caches once it has evicted: ``T + W``."""
        return self.budget + self.window

    def first_eviction(self, num_prompt_tokens: int) -> int:
        """Position of the first eviction, which is the cached length at it.

        ``first = T + W * ceil((max(L, T) + 1 - T) / W)``: after the prompt, at the earliest after
        its first decode step, and never before ``T + W``. A bounded prefill has it at ``T + W``,
        and with a prompt that is kept T includes it.
        """
        if self.keeps_prompt:
            return self.for_prompt(num_prompt_tokens).bound
        if self.bounded_prefill:
            return self.bound
        surplus = max(num_prompt_tokens, self.budget) + 1 - self.budget
        return self.budget + self.window * cdiv(surplus, self.window)

    def comes_to_evict(self, num_prompt_tokens: int, longest: int) -> bool:
        """Whether a sequence of at most ``longest`` tokens, prompt and output, can ever evict."""
        # The last token of an output is never fed back to the model.
        return longest - 1 > self.first_eviction(num_prompt_tokens)

    def why_nothing_evicts(self, max_model_len: int, budget_flag: str) -> str | None:
        """Why no sequence up to ``max_model_len`` tokens would ever evict, in one line, or None.

        Args:
            budget_flag: how the user sets the budget; the remedy names it.
        """
        # A prompt puts the first eviction off, if it changes anything.
        if self.comes_to_evict(0, max_model_len):
            return None
        return (
            f"no sequence would ever evict: --max-model-len ({max_model_len}) is not above "
            f"budget + window + 1 ({self.budget} + {self.window} + 1); lower {budget_flag} or "
            "raise --max-model-len"
        )

    def first_query(self, first: Array) -> Array:
        """Position of the earliest query that an eviction asks for: the first uses the last W."""
        return first - self.window

    def slots(self, positions: Array, first: Array, budget: Array | None = None) -> Array:
        """Slot of each position: ``p`` before the first eviction, else ``T + (p - first) mod W``.

        Args:
            positions: int64 of any shape, of numpy or torch.
            first: broadcastable to it; 0 marks a padding row, which never evicts.
            budget: of each sequence, broadcastable to it; None is the schedule's own.
        """
        evicted = (first > 0) & (positions >= first)
        own = self.budget if budget is None else budget
        return positions + evicted * (own + (positions - first) % self.window - positions)

    def due(self, positions: Array, first: Array) -> Array:
        """Whether a sequence evicts just before the step that starts at each position (bool)."""
        return (first > 0) & (positions >= first) & ((positions - first) % self.window == 0)

    def num_cached(self, position: int, first: int) -> int:
        """Tokens in the cache just before an eviction at ``position``."""
        return first if position == first else self.bound

    def num_row_blocks(
        self, num_tokens: int, first: int, block_size: int, num_state_blocks: int
    ) -> int:
        """Blocks that a sequence has been given by the time it has ``num_tokens`` tokens.

        They are those of its tokens until the first query is kept, and all that it ever gets from
        then on: the blocks of ``first`` tokens, and those of the query ring.
        """
        if num_tokens <= self.first_query(first):
            return cdiv(num_tokens, block_size)
        return cdiv(first, block_size) + num_state_blocks

    def num_tokens_of_row(
        self, num_blocks: int, first: int, block_size: int, num_state_blocks: int
    ) -> int:
        """Most tokens for which ``num_blocks`` blocks suffice: :meth:`num_row_blocks` backwards.

        >>> EvictionSchedule(budget=64, window=16).num_tokens_of_row(
        ...     3, first=80, block_size=16, num_state_blocks=2
        ... )
        48
        """
        if num_blocks >= cdiv(first, block_size) + num_state_blocks:
            # It holds all that it will ever get.
            return sys.maxsize
        return min(num_blocks * block_size, self.first_query(first))

    def evictions(self, num_prompt_tokens: int, num_output_tokens: int) -> tuple[int, int]:
        """What a finished sequence has evicted, if it was never preempted.

        Returns:
            Evictions, and tokens evicted per layer and KV head.
        """
        first = self.first_eviction(num_prompt_tokens)
        # The last token of an output is never fed back to the model.
        last_read = num_prompt_tokens + num_output_tokens - 2
        return self.for_prompt(num_prompt_tokens).evictions_until(last_read, first)

    def evictions_until(self, position: int, first: int) -> tuple[int, int]:
        """What a sequence has evicted when the token at ``position`` has been computed.

        Returns:
            Evictions, and tokens evicted per layer and KV head.
        """
        if position < first:
            return 0, 0
        num_evictions = (position - first) // self.window + 1
        return num_evictions, first - self.budget + (num_evictions - 1) * self.window

    def figures(self, position: int, first: int) -> dict[str, int]:
        """What a sequence holds and has evicted when the token at ``position`` has been computed.

        >>> EvictionSchedule(budget=128, window=16).figures(position=200, first=144)
        {'evictions': 4, 'evicted_tokens': 64, 'held_tokens': 137, 'logical_tokens': 201}

        Returns:
            ``evictions``; ``evicted_tokens`` and ``held_tokens`` per layer and KV head; and the
            ``logical_tokens`` that have been computed.
        """
        evictions, evicted_tokens = self.evictions_until(position, first)
        return {
            "evictions": evictions,
            "evicted_tokens": evicted_tokens,
            "held_tokens": self.slots(position, first) + 1,
            "logical_tokens": position + 1,
        }

    def tokens_until_eviction(self, position: int, first: int) -> int:
        """How many tokens from ``position`` on one step may compute.

        An eviction must fall between two steps. Only a preempted sequence that recomputes its
        output, and a bounded prefill, ever have more tokens ready than this.
        """
        if position < first:
            return first - position
        return self.window - (position - first) % self.window
