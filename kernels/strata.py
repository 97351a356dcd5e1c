"""Strata: parts of the text, by position, of which each keeps as many candidates as the others.

Of n candidates m are not protected. By position these are divided into S strata: the one at place p
of them belongs to stratum ``floor(p * S / m)``. With K tokens to be kept beside the protected ones,
every stratum keeps its K // S best, and of the next best of all strata the K % S best are kept
(``torch_strata.py`` is the same in plain torch). There is always a next best one, for an eviction
leaves out at least W >= S of the m.

Slots are not in the order of the text, so the position of a token goes along with it, one fp32
number in the state blocks. Positions are found bit by bit as priorities are, and no two are alike.

Cost of one head with n = 4096 and S = 4, beside that of ``selection.py``: 4 bytes of state and 8 of
scratch memory for each candidate, three searches in the positions, and for each stratum one in its
members' priorities and three passes over them, 24 bytes for each candidate.
"""

import triton
import triton.language as tl

from vase_vllm.kernels.paged import KEPT_COLUMN, number_pointers
from vase_vllm.kernels.search import HIGHEST, is_selected, k_largest, load_ordered

NO_RANK = tl.constexpr(0xFFFFFFFFFFFFFFFF)
"""Above the rank of every candidate."""


@triton.jit
def newest_positions(task, slots, WINDOW: tl.constexpr):
    """Positions of tokens at or above the budget, which lie as they came: int32.

    At a first eviction all do, and the position of a token is its slot.
    """
    position = tl.load(task.table_row) + task.eviction * WINDOW
    return position - WINDOW - task.candidates + slots


@triton.jit
def load_positions(
    task,
    pages,
    slots,
    first_number,  # how many other numbers lie before the positions
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Positions of candidates, int32; a first eviction writes them for the later ones.

    A kept prompt has none, and is not asked for any.
    """
    kept = tl.load(task.table_row + KEPT_COLUMN)
    has_number = (slots >= kept) & (slots < tl.minimum(task.budget, task.candidates))
    numbers = first_number + slots - kept
    pointers = number_pointers(pages, numbers, has_number, WINDOW, GROUP, HEAD_SIZE, BLOCK_SIZE)
    positions = newest_positions(task, slots, WINDOW)
    if task.eviction > 0:
        positions = tl.load(pointers, mask=has_number, other=0.0).to(tl.int32)
    else:
        tl.store(pointers, positions.to(tl.float32), mask=has_number)
    return positions


@triton.jit
def _ranks(x, slots):
    """Priorities of one stratum, with ties to the lower slots: uint64, no two alike."""
    return (x.to(tl.uint64) << 32) | (~slots.to(tl.uint32)).to(tl.uint64)


@triton.jit
def keep_by_strata(
    ordered,  # int32, in: ordered bits of the priorities, HIGHEST where protected
    places,  # int32, in: above 0 and in the order of the text where not protected, else 0
    members,  # int32, to work in
    candidates,
    num_protected,
    num_kept,
    STRATA: tl.constexpr,
    SEARCH_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Change the priorities so that the ``num_kept`` largest of all are as many in each stratum.

    The best of each stratum become ``HIGHEST``; its next best one, of which some strata keep
    theirs, stays what it is; all others become 0.
    """
    num_ranked = candidates - num_protected
    num_of_each = (num_kept - num_protected) // STRATA
    begin = tl.full([], 1, tl.uint32)
    for stratum in range(STRATA):
        num_behind = num_ranked - tl.cdiv((stratum + 1) * num_ranked, STRATA)
        end = tl.full([], 0xFFFFFFFF, tl.uint32)
        if num_behind > 0:
            end, _ = k_largest(places, candidates, num_behind, SEARCH_TILE, TILE)
        for start in range(0, candidates, TILE):
            slots = start + tl.arange(0, TILE)
            place = load_ordered(places, slots, candidates)
            x = load_ordered(ordered, slots, candidates)
            x = tl.where((place >= begin) & (place < end), x, 0)
            tl.store(members + slots, x.to(tl.int32, bitcast=True), mask=slots < candidates)
        begin = end
        tl.debug_barrier()
        threshold, tie_end = k_largest(members, candidates, num_of_each + 1, SEARCH_TILE, TILE)
        next_best = tl.full([], 0xFFFFFFFFFFFFFFFF, tl.uint64)
        for start in range(0, candidates, TILE):
            slots = start + tl.arange(0, TILE)
            x = load_ordered(members, slots, candidates)
            is_best = is_selected(x, slots, threshold, tie_end) & (slots < candidates)
            ranks = tl.where(is_best, _ranks(x, slots), NO_RANK)
            next_best = tl.minimum(next_best, tl.min(ranks, axis=0))
        for start in range(0, candidates, TILE):
            slots = start + tl.arange(0, TILE)
            x = load_ordered(members, slots, candidates)
            ranks = _ranks(x, slots)
            bits = tl.where(ranks > next_best, HIGHEST, tl.where(ranks == next_best, x, 0))
            is_member = (x > 0) & (slots < candidates)
            tl.store(ordered + slots, bits.to(tl.int32, bitcast=True), mask=is_member)
        tl.debug_barrier()
