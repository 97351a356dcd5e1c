"""Paged caches full of random tokens, and whether an eviction of them was right."""

from dataclasses import dataclass

import torch

from vase_vllm.kernels.evict import PagedEviction
from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.kernels.ring import TritonRingWrite
from vase_vllm.kernels.torch_distinctness import distinctness
from vase_vllm.kernels.torch_eviction import (
    attention_scores,
    largest,
    sampling_noise,
    value_range,
)
from vase_vllm.kernels.torch_strata import by_strata, strata_of
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.block_table_row import BlockTableRow, RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.token_state import TokenStateLayout
from vase_vllm.worker.token_state import load_numbers

TOLERANCE = 1e-4
"""How far from the threshold a priority may be for its token to be on the wrong side of it.

Of distinctness, relative to the threshold."""


@dataclass(frozen=True)
class Shape:
    """A model's attention, its cache and an eviction of it."""

    parameters: EvictionParameters
    num_due: int = 1
    num_layers: int = 36
    num_kv_heads: int = 8
    group_size: int = 4
    head_size: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    layout: str = "NHD"
    extra: int = 0
    """Tokens beyond budget + window at the first eviction."""

    @property
    def num_cached(self) -> int:
        return self.parameters.budget + self.parameters.window + self.extra

    @property
    def num_candidates(self) -> int:
        return self.num_cached - self.parameters.window

    @property
    def num_query_rows(self) -> int:
        return self.group_size * self.parameters.window

    @property
    def num_heads(self) -> int:
        """Heads that one call evicts from, all sequences and layers together."""
        return self.num_due * self.num_layers * self.num_kv_heads

    @property
    def ring(self) -> RingLayout:
        return RingLayout(self.parameters.window, self.group_size, self.block_size)

    @property
    def num_state_blocks(self) -> int:
        return self.ring.num_blocks + self.token_state.num_blocks

    @property
    def token_state(self) -> TokenStateLayout:
        """Where the numbers lie that go along with the tokens."""
        parameters, cell_bytes = self.parameters, 2 * self.head_size * self.dtype.itemsize
        return TokenStateLayout(
            parameters.num_numbers, parameters.budget, self.block_size, cell_bytes
        )

    @property
    def softmax_scale(self) -> float:
        return self.head_size**-0.5

    @property
    def cache_bytes(self) -> int:
        """K and V of all that is evicted from."""
        return self.num_heads * self.num_cached * 2 * self.head_size * self.dtype.itemsize

    @property
    def least_bytes(self) -> int:
        """K and V of the candidates read once, the queries, and the window moved."""
        window = 2 * self.parameters.window * 2 * self.head_size
        cells = self.num_candidates * 2 * self.head_size + self.num_query_rows * self.head_size
        return self.num_heads * (cells + window) * self.dtype.itemsize

    @property
    def least_flop(self) -> int:
        """The logits, twice: a mean of softmaxes needs their denominators first."""
        product = 2 * self.num_query_rows * self.head_size * self.num_candidates
        return self.num_heads * 2 * product


class Workload:
    """Sequences that are all at their first eviction, in shuffled blocks."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        num_token_blocks = cdiv(shape.num_cached, shape.block_size)
        per_row = shape.num_state_blocks + num_token_blocks
        num_blocks = 1 + shape.num_due * per_row
        sizes = [num_blocks, shape.block_size, shape.num_kv_heads, 2 * shape.head_size]
        if shape.layout == "HND":
            sizes[1], sizes[2] = sizes[2], sizes[1]
        self.caches = []
        for _ in range(shape.num_layers):
            cache = torch.empty(sizes, dtype=shape.dtype, device=device).normal_()
            self.caches.append(cache if shape.layout == "HND" else cache.transpose(1, 2))
        blocks = torch.randperm(num_blocks - 1, device=device).view(shape.num_due, per_row) + 1
        header = torch.tensor(RowHeader(shape.num_cached, 0, shape.parameters.budget, 0))
        header = header.to(device).repeat(shape.num_due, 1)
        header[:, BlockTableRow.KEY] = 1000 + torch.arange(shape.num_due, device=device)
        self.block_table = torch.cat([header, blocks], dim=1).int()
        self.positions = self.block_table[:, BlockTableRow.FIRST].clone()
        self.rows = torch.arange(shape.num_due, dtype=torch.int32, device=device)
        self.pointers = torch.tensor([cache.data_ptr() for cache in self.caches], device=device)
        self.layer_indices = torch.arange(shape.num_layers, dtype=torch.int32, device=device)
        self._counts: dict[EvictionParameters, torch.Tensor] = {}
        # Positions out of order, as they are after an eviction.
        order = torch.rand(shape.num_due, shape.num_candidates, device=device)
        self.arrival = order.argsort(dim=-1).int()

    def evict(
        self, num_splits: int | None = None, parameters: EvictionParameters | None = None
    ) -> None:
        """Evict; ``parameters`` other than the shape's have to have its budget and window."""
        parameters = parameters or self.shape.parameters
        if parameters not in self._counts:
            # Copied to the device once, so that no launch that is timed waits for it.
            rows = torch.tensor([parameters.counts] * self.shape.num_due, dtype=torch.int32)
            self._counts[parameters] = rows.to(self.rows.device)
        PagedEviction(
            self.pointers,
            self.caches[0],
            self.layer_indices,
            self.block_table,
            self.rows,
            self.positions,
            parameters,
            group_size=self.shape.group_size,
            softmax_scale=self.shape.softmax_scale,
            max_num_cached=self.shape.num_cached,
            counts=self._counts[parameters],
            num_splits=num_splits,
            slot_priority=self.arrival if parameters.scoring == "age" else None,
        ).run()

    def cells(self, layer: int, row: int) -> torch.Tensor:
        """The cells of a row's slots, dense: [H, n, 2 * D]."""
        stop = BlockTableRow.state_column(self.shape.num_cached, self.shape.block_size)
        blocks = self.block_table[row, BlockTableRow.NUM_HEADER : stop].long()
        return self.caches[layer][blocks].transpose(0, 1).flatten(1, 2)[:, : self.shape.num_cached]

    def queries(self, layer: int, row: int) -> torch.Tensor:
        """The ring: [H, W * G, D]."""
        shape = self.shape
        start = BlockTableRow.state_column(shape.num_cached, shape.block_size)
        blocks = self.block_table[row, start : start + shape.ring.num_blocks].long()
        vectors = self.caches[layer][blocks].transpose(0, 1).flatten(2)
        vectors = vectors[..., : shape.ring.entries_per_block * shape.group_size * shape.head_size]
        vectors = vectors.reshape(shape.num_kv_heads, -1, shape.head_size)
        return vectors[:, : shape.num_query_rows]

    def numbers(self, layer: int, row: int) -> torch.Tensor:
        """What goes along with the tokens after an eviction, on the CPU: [H, numbers, budget]."""
        shape = self.shape
        start = BlockTableRow.state_column(shape.num_cached, shape.block_size)
        blocks = self.block_table[row, start + shape.ring.num_blocks :].long()
        return load_numbers(shape.token_state, self.caches[layer], blocks).cpu()

    def received(self, layer: int, row: int) -> torch.Tensor:
        """Attention that the window's queries have paid to each token, on the CPU: [H, slots] fp32.

        A query has seen the candidates, and of the window the tokens up to its own.
        """
        shape, window = self.shape, self.shape.parameters.window
        keys = self.cells(layer, row)[..., : shape.head_size].cpu().float()
        queries = self.queries(layer, row).cpu().float()
        entries = torch.arange(shape.num_query_rows) // shape.group_size
        newest = shape.num_candidates + (entries - shape.num_cached) % window
        is_later = torch.arange(shape.num_cached) > newest[:, None]
        scale = shape.softmax_scale / shape.parameters.temperature
        logits = queries @ keys.transpose(1, 2) * scale
        return logits.masked_fill(is_later, -torch.inf).softmax(dim=-1).sum(dim=1)

    def scores(self, layer: int, row: int) -> torch.Tensor:
        """The reference's scores of the candidates, on the CPU: [H, n] fp32."""
        shape, parameters = self.shape, self.shape.parameters
        if parameters.scoring == "uniform":
            return torch.ones(shape.num_kv_heads, shape.num_candidates)
        if parameters.scoring == "age":
            return self.arrival[row].cpu().float().expand(shape.num_kv_heads, -1)
        if parameters.memory:
            # At a first eviction all candidates have been seen by the same queries.
            return self.received(layer, row)[:, : shape.num_candidates]
        keys = self.cells(layer, row)[:, : shape.num_candidates, : shape.head_size].cpu().float()
        scale = shape.softmax_scale / parameters.temperature
        queries = self.queries(layer, row).cpu().float()
        return attention_scores(queries, keys.transpose(1, 2), scale, parameters.smoothing)

    def magnitudes(self, layer: int, row: int) -> torch.Tensor:
        """The reference's numbers that protect the candidates, on the CPU: [H, n] fp32."""
        shape, parameters = self.shape, self.shape.parameters
        cells = self.cells(layer, row).cpu().float().tensor_split([shape.num_candidates], dim=1)
        (keys, values), (window_keys, window_values) = (part.chunk(2, dim=-1) for part in cells)
        if parameters.protect_by == "value_range":
            return value_range(values)
        keys, window_keys = keys.transpose(1, 2), window_keys.transpose(1, 2)
        return distinctness(keys, values, window_keys, window_values, parameters.ridge)


def wrong_heads(shape: Shape, device: torch.device, num_splits: int | None = None) -> int:
    """Evict, compare with the reference in fp32, and count the heads that are not right.

    A head is right if exactly ``budget`` of its tokens are left, in the slots below the budget, and
    if the survivors are the reference's but for tokens whose priority is at the threshold. For each
    token whose distinctness is at the threshold of the protected, two others may be different: it
    takes another's place among the protected, and that one a third's among the rest; with strata in
    each of these, for their ends may move by one.
    """
    workload, parameters = Workload(shape, device), shape.parameters
    places = [(layer, row) for layer in range(shape.num_layers) for row in range(shape.num_due)]
    before = {place: workload.cells(*place).cpu() for place in places}
    scores_before = {place: workload.scores(*place) for place in places}
    magnitudes_before = {place: workload.magnitudes(*place) for place in places}
    received_before = {place: workload.received(*place) for place in places if parameters.memory}
    workload.evict(num_splits)
    num_wrong, slots = 0, torch.arange(shape.num_candidates, dtype=torch.float32)
    for layer, row in places:
        cells, scores = before[layer, row], scores_before[layer, row]
        heads, noise = torch.arange(shape.num_kv_heads), None
        if parameters.sampling == "gumbel":
            noise = sampling_noise(
                parameters.seed, shape.num_candidates, 0, layer, heads, 1000 + row
            )
        magnitudes = magnitudes_before[layer, row]
        # Positions are whole numbers: one apart is far.
        priority = scores.clone() if parameters.scoring == "age" else scores.log()
        priority += 0.0 if noise is None else noise
        magnitudes[:, : parameters.sinks] = torch.inf
        protected = largest(magnitudes, parameters.protected)
        priority.masked_fill_(protected, torch.inf)
        num_near = _near_the_protected(magnitudes, protected)
        strata = strata_of(~protected, slots.expand_as(priority), parameters.strata)
        strata.clamp_max_(parameters.strata - 1)
        ranks = priority
        if parameters.strata > 1:
            ranks = by_strata(priority, slots.expand_as(priority), parameters.strata)
        keep = largest(ranks, parameters.budget - parameters.window)
        after = _fingerprints(workload.cells(layer, row).cpu()[:, : parameters.budget])
        for head, old in enumerate(_fingerprints(cells)):
            left = torch.isin(old, after[head])
            is_whole = bool(left[shape.num_candidates :].all())
            right = is_whole and int(left.sum()) == parameters.budget
            kept, of_all, left = keep[head], left, left[: shape.num_candidates]
            thresholds = _least_kept(priority[head], kept, strata[head])
            off = (priority[head] - thresholds)[kept != left].abs()
            allowed = 0
            if parameters.protect_by == "distinctness":
                allowed = 2 * num_near[head] * parameters.strata
            right &= bool((off > TOLERANCE).sum() <= allowed)
            if right and parameters.memory:
                asked = shape.num_cached - torch.arange(shape.num_cached)
                asked.clamp_(max=parameters.window)
                numbers = torch.stack([received_before[layer, row][head], asked])[:, of_all]
                right = _alike(workload.numbers(layer, row)[head, :2], numbers)
            if right and parameters.strata > 1:
                # Slots are positions before a first eviction.
                came_from = workload.numbers(layer, row)[head, -1].long()
                right = torch.equal(old[came_from], after[head])
            num_wrong += int(not right)
    return num_wrong


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two times two numbers of the same tokens are alike, in whichever slots: [2, n]."""
    with_quotients = [torch.stack([*pair, pair[0] / pair[1]]) for pair in (found, expected)]
    return torch.allclose(*(rows.sort(dim=-1).values for rows in with_quotients), rtol=1e-3)


def _least_kept(priority: torch.Tensor, kept: torch.Tensor, strata: torch.Tensor) -> torch.Tensor:
    """The least priority that is kept of each candidate's stratum, of one head: [n]."""
    least = torch.full((int(strata.max()) + 1,), torch.inf)
    least.scatter_reduce_(0, strata[kept], priority[kept], "amin")
    return least[strata]


def _near_the_protected(magnitudes: torch.Tensor, protected: torch.Tensor) -> torch.Tensor:
    """How many candidates of each head are as near to the least protected one as rounding: [H].

    Itself is not counted, unless another one is as near.
    """
    least = magnitudes.masked_fill(~protected, torch.inf).amin(dim=-1, keepdim=True)
    near = ((magnitudes - least).abs() <= TOLERANCE * least.abs()).sum(dim=-1)
    return near.where(near > 1, 0)


def ring_is_right(shape: Shape, device: torch.device) -> bool:
    """Store a prompt's queries in the rings of one layer and read the windows back."""
    workload, window = Workload(shape, device), shape.parameters.window
    num_rows, length = shape.num_due, shape.num_cached
    num_heads = shape.num_kv_heads * shape.group_size
    query = torch.randn(num_rows * length, num_heads, shape.head_size, device=device)
    query = query.to(shape.dtype)
    TritonRingWrite(
        torch.arange(length, device=device).repeat(num_rows),
        torch.arange(0, num_rows * length + 1, length, dtype=torch.int32, device=device),
        torch.full((num_rows,), length, dtype=torch.int32, device=device),
        workload.block_table,
        window=window,
    ).store(workload.caches[0], query)
    last = query.view(num_rows, length, shape.num_kv_heads, shape.group_size, -1)[:, -window:]
    # The query of position p lies at entry p % window.
    expected = last.roll(length % window, dims=1).permute(0, 2, 1, 3, 4).flatten(2, 3)
    stored = torch.stack([workload.queries(0, row) for row in range(num_rows)])
    return torch.equal(stored, expected)


def _fingerprints(cells: torch.Tensor) -> torch.Tensor:
    """A number for each cell that tells random cells apart: [H, n, 2 * D] -> [H, n] int64."""
    words = cells.contiguous().view(torch.int16).long()
    multipliers = torch.arange(1, words.shape[-1] + 1) * 0x9E3779B97F4A7C1 % 2**47
    return (words * multipliers).sum(-1)
