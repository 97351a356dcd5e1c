"""A paged cache with due sequences in it, everything around them poisoned, and its oracle."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from vase_vllm.kernels.evict import PagedEviction
from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.kernels.torch_distinctness import distinctness
from vase_vllm.kernels.torch_eviction import (
    attention_scores,
    largest,
    plan_moves,
    sampling_noise,
    select_survivors,
    value_range,
)
from vase_vllm.layout.block_table_row import BlockTableRow, RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.token_state import TokenStateLayout

MARGIN = 1e-5
"""Relative gap around a selection threshold: above the rounding of two ways to sum in fp32."""
DISTINCTNESS_MARGIN = 2e-4
"""The same of distinctness, whose difference of squares loses digits."""


@dataclass(frozen=True)
class Sequence:
    """A row of the block table: position of the first eviction, position now.

    Its budget, sinks and protected tokens are those of ``parameters``, if it has its own; the first
    ``kept`` of its tokens are a prompt that is never evicted.
    """

    first: int
    position: int
    key: int = 12345
    parameters: EvictionParameters | None = None
    kept: int = 0


def ragged(parameters: EvictionParameters, *surplus: int) -> tuple[Sequence, ...]:
    """Sequences at their first eviction and later, one of them not due.

    Args:
        surplus: tokens by which the first evictions of the second and of the last are later than
            the earliest one.
    """
    first, window = parameters.budget + parameters.window, parameters.window
    second, last = (first + tokens for tokens in surplus)
    return (
        Sequence(first, first, key=1),
        Sequence(second, second, key=2),
        Sequence(first, first + 3, key=3),
        Sequence(first, first + 5 * window, key=4),
        Sequence(last, last + window, key=2**31 - 1),
    )


def after_evictions(number: int, of: EvictionParameters, **changes: Any) -> Sequence:
    """A sequence that is due, and has evicted so often before."""
    first = of.budget + of.window
    return Sequence(first, first + number * of.window, **changes)


def one_for_each(
    own: list[EvictionParameters | None], server: EvictionParameters
) -> tuple[Sequence, ...]:
    """Sequences with parameters of their own, each an eviction further than the one before it.

    Args:
        own: of each; None: the server's.
    """
    return tuple(
        after_evictions(row, parameters or server, key=7 + row, parameters=parameters)
        for row, parameters in enumerate(own)
    )


def budgets_of_their_own(server: EvictionParameters) -> tuple[Sequence, ...]:
    """Kept prompts, whose tokens have no numbers, half the server's budget of 40, and all of it."""

    def sequence(evictions: int, kept: int = 0, **own: int) -> Sequence:
        parameters = replace(server, **own)
        return after_evictions(
            evictions, parameters, key=evictions, parameters=parameters, kept=kept
        )

    return (
        sequence(0, kept=30, budget=40 + 30, sinks=30, protected=30 + 9),
        sequence(2, kept=101, budget=40 + 101, sinks=101, protected=101 + 9),
        sequence(1, budget=20, protected=7),
        sequence(3, kept=3, budget=20 + 3, protected=7),
        sequence(3),
    )


@dataclass(frozen=True)
class Case:
    """What to evict from. Token contents are normal unless ``fill`` changes them.

    ``fill(keys, values, queries)`` gets one head's [n, D], [n, D] and [W, G, D] to change in place.
    """

    parameters: EvictionParameters
    sequences: tuple[Sequence, ...]
    head_size: int = 64
    group_size: int = 2
    num_kv_heads: int = 2
    layers: tuple[int, ...] = (3,)
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "HND"
    first_kv_head: int = 0
    num_splits: int | None = None
    scratch_bytes: int | None = None
    seed: int = 0
    fill: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None
    separated: bool = field(default=True)

    @property
    def ring(self) -> RingLayout:
        return RingLayout(self.parameters.window, self.group_size, self.block_size)

    @property
    def state(self) -> TokenStateLayout:
        """Where the numbers lie that go along with the tokens."""
        return TokenStateLayout(
            self.parameters.num_numbers,
            self.parameters.budget,
            self.block_size,
            2 * self.head_size * self.dtype.itemsize,
        )

    @property
    def num_state_blocks(self) -> int:
        return self.ring.num_blocks * self.has_queries + self.state.num_blocks

    @property
    def has_queries(self) -> bool:
        """Whether there is a query ring; where nothing scores with it, there is none."""
        return self.parameters.scoring == "attention"

    @property
    def softmax_scale(self) -> float:
        return self.head_size**-0.5

    def of(self, sequence: Sequence) -> EvictionParameters:
        """The parameters of a sequence."""
        return sequence.parameters or self.parameters

    def num_cached(self, sequence: Sequence) -> int:
        """Tokens in the cache, whether an eviction is due or not."""
        budget, window = self.of(sequence).budget, self.parameters.window
        if sequence.position <= sequence.first or sequence.first == 0:
            return sequence.position
        steps = (sequence.position - sequence.first) % window
        return budget + (steps or window)

    def is_due(self, sequence: Sequence) -> bool:
        elapsed = sequence.position - sequence.first
        return sequence.first > 0 and elapsed >= 0 and elapsed % self.parameters.window == 0


class Pool:
    """The pages of a case, one pool per layer, NaN wherever no sequence has a token or query."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)
        heads, block_size, head_size = case.num_kv_heads, case.block_size, case.head_size
        # After a first eviction rows still name the blocks that it has emptied.
        longest = [max(case.num_cached(s), s.first) for s in case.sequences]
        num_token_blocks = [-(-length // block_size) for length in longest]
        columns = BlockTableRow.NUM_HEADER + case.num_state_blocks + max(num_token_blocks)
        num_blocks = 3 + len(case.sequences) * columns
        free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        self.block_table = torch.zeros(len(case.sequences), columns, dtype=torch.int32)
        self.positions = torch.tensor([s.position for s in case.sequences], dtype=torch.int32)
        shape = (num_blocks, heads, block_size, 2 * head_size)
        if case.layout == "NHD":
            shape = (num_blocks, block_size, heads, 2 * head_size)
        self.caches = [torch.full(shape, torch.nan, dtype=case.dtype) for _ in case.layers]
        if case.layout == "NHD":
            self.caches = [cache.transpose(1, 2) for cache in self.caches]
        for row, sequence in enumerate(case.sequences):
            num_blocks = case.num_state_blocks + num_token_blocks[row]
            budget = case.of(sequence).budget
            header = RowHeader(sequence.first, sequence.key, budget, sequence.kept)
            entries = [*header, *(free.pop() for _ in range(num_blocks))]
            self.block_table[row, : len(entries)] = torch.tensor(entries)
            for cache in self.caches:
                self._fill(cache, row, generator)
        self.arrival = None
        if case.parameters.scoring == "age":
            rows = [self._arrival(sequence, generator) for sequence in case.sequences]
            self.arrival = pad_sequence(rows, batch_first=True, padding_value=2**31 - 1)

    def _arrival(self, sequence: Sequence, generator: torch.Generator) -> torch.Tensor:
        """Positions of the candidates: in order at first; later the newest, anywhere."""
        parameters = self.case.of(sequence)
        candidates = self.case.num_cached(sequence) - parameters.window
        arrival = torch.arange(candidates, dtype=torch.int32)
        if sequence.position > sequence.first:
            num_others = candidates - parameters.sinks
            arrival[parameters.sinks :] = torch.randperm(num_others, generator=generator)
            arrival[parameters.sinks :] += sequence.position - parameters.window - num_others
        return arrival

    def _fill(self, cache: torch.Tensor, row: int, generator: torch.Generator) -> None:
        case, window = self.case, self.case.parameters.window
        num_cached = case.num_cached(case.sequences[row])
        for head in range(case.num_kv_heads):
            tokens = torch.randn(num_cached, 2 * case.head_size, generator=generator)
            queries = torch.randn(window, case.group_size, case.head_size, generator=generator)
            if case.fill is not None:
                case.fill(tokens[:, : case.head_size], tokens[:, case.head_size :], queries)
            slots = torch.arange(num_cached)
            cache[self.blocks(row, slots), head, slots % case.block_size] = tokens.to(case.dtype)
            for entry in range(window if case.has_queries else 0):
                for query_head in range(case.group_size):
                    self.ring_vector(cache, row, head, entry, query_head)[:] = queries[
                        entry, query_head
                    ]
        sequence = case.sequences[row]
        if case.state.num_numbers and sequence.position > sequence.first:
            self.put_numbers(cache, row, self._drawn_numbers(cache, row, generator))

    def _drawn_numbers(
        self, cache: torch.Tensor, row: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Numbers as earlier evictions could have left them."""
        case, sequence = self.case, self.case.sequences[row]
        shape = self.numbers(cache, row)[0].shape
        numbers = []
        if case.parameters.memory:
            received, asked = torch.rand(2, *shape, generator=generator)
            numbers += [received, case.parameters.window * (0.5 + asked)]
        if case.parameters.strata > 1:
            num_positions = sequence.position - case.parameters.window - sequence.kept
            order = torch.rand(num_positions, shape[1], generator=generator).argsort(dim=0)
            numbers.append(sequence.kept + order[: shape[0]].float())
        return torch.stack(numbers)

    def numbers(self, cache: torch.Tensor, row: int) -> torch.Tensor:
        """Numbers of the tokens that an eviction leaves: [numbers, budget less a kept prompt, H].

        With memory the attention received, and by how many queries it was paid; with strata the
        position.
        """
        block, cell, word = self._number_places(row)
        return cache.view(torch.float32)[block, :, cell, word]

    def put_numbers(self, cache: torch.Tensor, row: int, numbers: torch.Tensor) -> None:
        block, cell, word = self._number_places(row)
        cache.view(torch.float32)[block, :, cell, word] = numbers

    def _number_places(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block, cell and fp32 word of each number, from the words of the contract."""
        case, sequence = self.case, self.case.sequences[row]
        index = torch.arange(case.of(sequence).budget - sequence.kept)
        first = case.parameters.budget * torch.arange(case.state.num_numbers)
        index = first[:, None] + index
        cell_size = 2 * case.head_size * case.dtype.itemsize // 4
        front = BlockTableRow.NUM_HEADER - (-sequence.first // case.block_size)
        columns = front + case.ring.num_blocks + index // cell_size // case.block_size
        blocks = self.block_table[row, columns].long()
        return blocks, index // cell_size % case.block_size, index % cell_size

    def blocks(self, row: int, slots: torch.Tensor) -> torch.Tensor:
        """Blocks of a row's slots: int64."""
        columns = BlockTableRow.NUM_HEADER + slots // self.case.block_size
        return self.block_table[row, columns].long()

    def ring_vector(
        self, cache: torch.Tensor, row: int, head: int, entry: int, query_head: int
    ) -> torch.Tensor:
        """The [D] view of one query in the ring, from the words of the contract."""
        case = self.case
        column, entry_of_block = divmod(entry, case.ring.entries_per_block)
        front = BlockTableRow.NUM_HEADER - (-case.sequences[row].first // case.block_size)
        block = self.block_table[row, front + column]
        vector = entry_of_block * case.group_size + query_head
        start = vector % 2 * case.head_size
        return cache[block, head, vector // 2, start : start + case.head_size]

    def evict(self, rows: list[int] | None = None, max_num_cached: int | None = None) -> None:
        """Launch the kernels."""
        self.eviction(rows, max_num_cached).run()

    def eviction(
        self, rows: list[int] | None = None, max_num_cached: int | None = None
    ) -> PagedEviction:
        """What :meth:`evict` launches."""
        case = self.case
        rows = list(range(len(case.sequences))) if rows is None else rows
        scratch = None
        if case.scratch_bytes is not None:
            scratch = torch.full((case.scratch_bytes,), 0x7F, dtype=torch.uint8)
        if max_num_cached is None:
            max_num_cached = max(case.num_cached(case.sequences[row]) for row in rows)
        slot_priority = None
        if self.arrival is not None:
            num_candidates = max_num_cached - case.parameters.window
            slot_priority = self.arrival[rows, :num_candidates].contiguous()
        of_rows = [case.of(case.sequences[row]).counts for row in rows]
        has_own = any(case.sequences[row].parameters for row in rows)
        self.nan_keys = torch.full((len(rows),), -1, dtype=torch.int32)
        return PagedEviction(
            torch.tensor([cache.data_ptr() for cache in self.caches]),
            self.caches[0],
            torch.tensor(case.layers, dtype=torch.int32),
            self.block_table,
            torch.tensor(rows, dtype=torch.int32),
            self.positions,
            case.parameters,
            group_size=case.group_size,
            softmax_scale=case.softmax_scale,
            max_num_cached=max_num_cached,
            first_kv_head=case.first_kv_head,
            counts=torch.tensor(of_rows, dtype=torch.int32) if has_own else None,
            scratch=scratch,
            num_splits=case.num_splits,
            slot_priority=slot_priority,
            nan_keys=self.nan_keys,
        )

    def expected(self) -> tuple[list[torch.Tensor], bool]:
        """The caches after the eviction, by the reference; whether no choice hung on rounding."""
        case = self.case
        caches, separated = [cache.clone() for cache in self.caches], True
        for layer, cache in zip(case.layers, caches, strict=True):
            for row, sequence in enumerate(case.sequences):
                if not case.is_due(sequence):
                    continue
                parameters = case.of(sequence)
                num_cached = case.num_cached(sequence)
                slots = torch.arange(num_cached)
                candidates = num_cached - parameters.window
                tokens = cache[self.blocks(row, slots), :, slots % case.block_size].transpose(0, 1)
                all_keys, all_values = tokens.float().split(case.head_size, dim=-1)
                keys, values = all_keys[:, :candidates], all_values[:, :candidates]
                scores = self._scores(cache, row, keys)
                numbers = self._numbers_after(cache, row, all_keys)
                if parameters.memory:
                    received, asked = numbers[:2, :candidates].transpose(1, 2)
                    scores = received / asked
                noise = None
                if parameters.sampling == "gumbel":
                    noise = sampling_noise(
                        parameters.seed,
                        candidates,
                        (sequence.position - sequence.first) // parameters.window,
                        layer,
                        case.first_kv_head + torch.arange(case.num_kv_heads),
                        sequence.key,
                    )
                magnitudes = value_range(values)
                if parameters.protect_by == "distinctness":
                    sample = all_values[:, candidates:]
                    key_sample = all_keys[:, candidates:].transpose(1, 2)
                    magnitudes = distinctness(
                        keys.transpose(1, 2), values, key_sample, sample, parameters.ridge
                    )
                    separated &= _is_clear(magnitudes, parameters)
                if parameters.strata > 1:
                    positions = numbers[-1, :candidates].T
                    keep = _best_of_strata(parameters, scores, magnitudes, positions)
                    separated &= _differ(scores)
                else:
                    keep = select_survivors(parameters, scores, magnitudes, noise)
                    separated &= _separated(scores if noise is None else scores.log() + noise, keep)
                head, source, target = plan_moves(parameters.budget, parameters.window, keep)
                source_cells = cache[self.blocks(row, source), head, source % case.block_size]
                cache[self.blocks(row, target), head, target % case.block_size] = source_cells
                if parameters.num_numbers:
                    numbers[:, target, head] = numbers[:, source, head]
                    left = numbers[:, sequence.kept : parameters.budget]
                    self.put_numbers(cache, row, left)
        return caches, separated

    def _scores(self, cache: torch.Tensor, row: int, keys: torch.Tensor) -> torch.Tensor:
        """Scores of the candidates, keys [H, n, D]: [H, n] fp32."""
        parameters = self.case.parameters
        if parameters.scoring == "uniform":
            return torch.ones(keys.shape[:2])
        if self.arrival is not None:
            # Positions of these tests are exact in fp32.
            return self.arrival[row, : keys.shape[1]].float().expand(len(keys), -1)
        scale = self.case.softmax_scale / parameters.temperature
        queries = self._queries(cache, row)
        return attention_scores(queries, keys.transpose(1, 2), scale, parameters.smoothing)

    def _numbers_after(self, cache: torch.Tensor, row: int, keys: torch.Tensor) -> torch.Tensor:
        """The numbers of all tokens of an eviction, keys [H, n + W, D].

        Returns:
            [numbers, n + W, H].
        """
        parameters, sequence = self.case.parameters, self.case.sequences[row]
        num_tokens, position = keys.shape[1], sequence.position
        budget = self.case.of(sequence).budget
        before = self.numbers(cache, row)
        numbers = torch.zeros(parameters.num_numbers, num_tokens, len(keys))
        if parameters.strata > 1:
            # From the newest token backwards, as far as they lie in order.
            numbers[-1] = torch.arange(position - num_tokens, position)[:, None]
        if position > sequence.first:
            numbers[:, sequence.kept : budget] = before
        if parameters.memory:
            numbers[:2] *= parameters.memory
            numbers[:2] += self._received(cache, row, keys)
        return numbers

    def _received(self, cache: torch.Tensor, row: int, keys: torch.Tensor) -> torch.Tensor:
        """What the window's queries have paid each token, and how many: [2, n + W, H]."""
        parameters, sequence = self.case.parameters, self.case.sequences[row]
        scale = self.case.softmax_scale / parameters.temperature
        window, position = parameters.window, sequence.position
        queries = self._queries(cache, row).unflatten(1, (window, -1))
        received = torch.zeros(2, keys.shape[1], len(keys))
        for ago in range(window, 0, -1):
            of_position = queries[:, (position - ago) % window]
            num_seen = keys.shape[1] - ago + 1
            logits = of_position @ keys[:, :num_seen].transpose(1, 2) * scale
            received[0, :num_seen] += logits.softmax(dim=-1).sum(dim=1).T
            received[1, :num_seen] += 1
        return received

    def _queries(self, cache: torch.Tensor, row: int) -> torch.Tensor:
        case = self.case
        vectors = [
            torch.stack(
                [
                    self.ring_vector(cache, row, head, entry, query_head)
                    for entry in range(case.parameters.window)
                    for query_head in range(case.group_size)
                ]
            )
            for head in range(case.num_kv_heads)
        ]
        return torch.stack(vectors).float()


def _best_of_strata(
    parameters: EvictionParameters,
    scores: torch.Tensor,
    magnitudes: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """The survivors where the rest of the budget goes to strata, head by head: [H, n] bool."""
    magnitudes = magnitudes.clone()
    magnitudes[:, : parameters.sinks] = torch.inf
    keep = largest(magnitudes, parameters.protected)
    scores = scores.nan_to_num(nan=-torch.inf)
    for kept, score, position in zip(keep, scores, positions, strict=True):
        ranked = sorted(torch.nonzero(~kept)[:, 0].tolist(), key=lambda slot: position[slot])
        strata: list[list[int]] = [[] for _ in range(parameters.strata)]
        for place, slot in enumerate(ranked):
            strata[place * parameters.strata // len(ranked)].append(slot)
        ascending = [sorted(slots, key=lambda slot: -slot) for slots in strata]
        ascending = [sorted(slots, key=lambda slot: score[slot]) for slots in ascending]
        num_left = parameters.budget - parameters.window - parameters.protected
        while num_left:
            best = [slots.pop() for slots in ascending if slots]
            best = sorted(best, key=lambda slot: (-score[slot], slot))[:num_left]
            kept[best] = True
            num_left -= len(best)
    return keep


def _differ(scores: torch.Tensor) -> bool:
    """Whether rounding cannot change the order of any two scores of a head."""
    ordered = scores.sort(dim=-1).values
    return bool((ordered.diff(dim=-1) > MARGIN * ordered[:, 1:]).all())


def _separated(priority: torch.Tensor, keep: torch.Tensor) -> bool:
    """Whether the best victim of each head is clearly worse than every survivor near it."""
    for priorities, kept in zip(priority, keep, strict=True):
        if kept.all():
            continue
        best_victim = priorities[~kept].max()
        gaps = (priorities[kept] - best_victim).abs()
        if gaps.min() <= MARGIN * best_victim.abs().clamp_max(1.0):
            return False
    return True


def _is_clear(magnitudes: torch.Tensor, parameters: EvictionParameters) -> bool:
    """Whether rounding cannot change which tokens are protected."""
    magnitudes = magnitudes.clone()
    magnitudes[:, : parameters.sinks] = torch.inf
    protected = largest(magnitudes, parameters.protected)
    lowest = magnitudes.masked_fill(~protected, torch.inf).amin(dim=-1)
    highest = magnitudes.masked_fill(protected, -torch.inf).amax(dim=-1)
    return bool((lowest - highest > DISTINCTNESS_MARGIN * highest.abs()).all())


def assert_numbers(pool: Pool, expected: list[torch.Tensor]) -> None:
    """Compare the numbers that go with the tokens, and take those that were found as expected.

    They are sums, of which an order of summation changes the last bits.
    """
    for cache, wanted in zip(pool.caches, expected, strict=True):
        for row in range(len(pool.case.sequences)):
            found = pool.numbers(cache, row)
            torch.testing.assert_close(
                found, pool.numbers(wanted, row), rtol=1e-4, atol=1e-6, equal_nan=True
            )
            pool.put_numbers(wanted, row, found)


def check(case: Case) -> Pool:
    """Evict, and compare every byte of every page with the oracle. Returns the pool after it."""
    while True:
        pool = Pool(case)
        expected, separated = pool.expected()
        if separated or not case.separated:
            break
        case = replace(case, seed=case.seed + 1)
    pool.evict()
    if case.state.num_numbers:
        assert_numbers(pool, expected)
    for cache, wanted in zip(pool.caches, expected, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=0, atol=0, equal_nan=True)
    return pool
