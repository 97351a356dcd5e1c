"""Decode attention of xformers over the pages that an eviction leaves: a check, and a peer.

    python benchmarks/kernels/xformers_attention.py     on a GPU, with xformers installed

xformers gathers the survivors' pages by its own bias with a block table
(``PagedBlockDiagonalCausalWithOffsetPaddedKeysMask``) and knows nothing of evictions. It is handed
what vLLM's backends are: the block table and the lengths of the remapping. What it computes is
compared with attention in fp32 over the tokens that the reference keeps.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.common.exit_codes import SKIPPED  # noqa: E402
from benchmarks.kernels.policies import parameters_of, unscored  # noqa: E402
from benchmarks.kernels.timing import fits, milliseconds  # noqa: E402
from benchmarks.kernels.workload import Shape, Workload  # noqa: E402
from vase_vllm.kernels.remap import BatchRemap  # noqa: E402
from vase_vllm.kernels.torch_eviction import (  # noqa: E402
    sampling_noise,
    select_survivors,
    value_range,
)

BLOCK_SIZE = 64
"""xformers' split-K kernel takes pages of a multiple of its tile of 64 keys."""
TOLERANCE = 5e-4
"""Largest difference of outputs in fp16; one token of a few hundred makes several times that."""
MOST_AT_THRESHOLD = 0.1
"""Share of the heads whose survivors may differ from the reference's by a tie at the threshold."""

Attention = Callable[["EvictedStep", torch.Tensor], torch.Tensor]
"""Of a step's queries, [B, H, G, D], over its pages: [B, H, G, D]."""


class EvictedStep:
    """The step after an eviction of one layer: a new token for every sequence, and what it sees.

    Attributes:
        pages: [blocks * block_size, H, 2 * D], K and V of every slot.
        block_table: [B, columns] int32, the token blocks of each sequence.
        num_cached: tokens that a sequence has after the step.
        new_cells: [B, H, 2 * D], K and V of the new tokens.
    """

    def __init__(self, workload: Workload) -> None:
        shape, device = workload.shape, workload.device
        num_rows, int32 = shape.num_due, torch.int32
        width = workload.block_table.shape[1]
        self.block_table = torch.zeros(num_rows, width, dtype=int32, device=device)
        slots = torch.zeros(num_rows, dtype=torch.int64, device=device)
        starts, num_cached = torch.zeros(2, num_rows, dtype=int32, device=device)
        BatchRemap(
            torch.arange(num_rows + 1, dtype=int32, device=device),
            workload.positions + 1,
            workload.block_table,
            slots,
            starts,
            num_cached,
            self.block_table,
            window=shape.parameters.window,
            block_size=shape.block_size,
        ).run()
        self.num_cached = num_cached.tolist()
        self.pages = workload.caches[0].transpose(1, 2).flatten(0, 1)
        self.new_cells = torch.randn(num_rows, *self.pages.shape[1:], device=device).to(shape.dtype)
        self.pages[slots] = self.new_cells


class UnsupportedError(Exception):
    """xformers has no kernel that attends over pages here; the message has the reasons."""


def xformers_attention(step: EvictedStep, query: torch.Tensor) -> torch.Tensor:
    """Of a step's queries, [B, H, G, D], by xformers: [B, H, G, D].

    Raises:
        UnsupportedError: none of its kernels can.
    """
    return prepare(step, query)()


def prepare(step: EvictedStep, query: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The attention of a step, ready to be captured: what comes from the host is there.

    Raises:
        UnsupportedError: none of xformers' kernels can do it.
    """
    from xformers.ops import fmha
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask

    num_rows, group_size, head_size = query.shape[0], *query.shape[2:]
    bias = PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        [1] * num_rows, step.num_cached, step.block_table, BLOCK_SIZE, device=query.device
    )
    # [1, tokens, KV heads, query heads of each, D]: a KV head is read once for its query heads.
    pages = step.pages[None, :, :, None].expand(-1, -1, -1, group_size, -1)
    keys, values = pages[..., :head_size], pages[..., head_size:]

    def attend(operator: Any) -> torch.Tensor:
        output = fmha.memory_efficient_attention_forward(
            query[None], keys, values, bias, op=operator
        )
        return output.view(query.shape)

    reasons = []
    # xformers chooses by shapes alone, and takes a kernel that the installed Triton cannot compile.
    for operator in (fmha.triton_splitk.FwOp, fmha.flash3.FwOp):
        try:
            attend(operator)
        except Exception as error:
            reasons.append(f"{operator.NAME}: {str(error).splitlines()[-1].strip()}")
        else:
            return partial(attend, operator)
    raise UnsupportedError("; ".join(reasons))


def wrong_outputs(shape: Shape, device: torch.device, attention: Attention) -> tuple[int, int, int]:
    """Evict, attend, and compare with attention in fp32 over the reference's survivors.

    Returns:
        KV heads with an output that is not right, heads whose survivors differ by a tie at the
        threshold (``eviction.py`` judges those), and heads of all.
    """
    shape = replace(shape, num_layers=1, block_size=BLOCK_SIZE)
    workload = Workload(shape, device)
    rows = range(shape.num_due)
    kept = [survivors(workload, row) for row in rows]
    workload.evict()
    step = EvictedStep(workload)
    query = torch.randn(
        shape.num_due, shape.num_kv_heads, shape.group_size, shape.head_size, device=device
    ).to(shape.dtype)
    outputs = attention(step, query).cpu().float()
    num_wrong = num_ties = 0
    for row in rows:
        after = workload.cells(0, row).cpu()[:, : shape.parameters.budget]
        same = (bit_sums(after) == bit_sums(kept[row])).all(-1)
        visible = torch.cat([kept[row], step.new_cells[row].cpu()[:, None]], dim=1).float()
        keys, values = visible.split(shape.head_size, dim=-1)
        logits = query[row].cpu().float() @ keys.transpose(1, 2) * shape.softmax_scale
        error = (torch.softmax(logits, dim=-1) @ values - outputs[row]).abs().amax((1, 2))
        # Not a number is no small error either.
        num_wrong += int((same & ~(error <= TOLERANCE)).sum())
        num_ties += int((~same).sum())
    return num_wrong, num_ties, shape.num_heads


def survivors(workload: Workload, row: int) -> torch.Tensor:
    """K and V of the tokens that the reference keeps of a row: [H, T, 2 * D], on the CPU."""
    shape, parameters = workload.shape, workload.shape.parameters
    cells, scores = workload.cells(0, row).cpu(), workload.scores(0, row)
    noise = None
    if parameters.sampling == "gumbel":
        heads, key = torch.arange(shape.num_kv_heads), 1000 + row
        noise = sampling_noise(parameters.seed, shape.num_candidates, 0, 0, heads, key)
    ranges = value_range(cells[:, : shape.num_candidates, shape.head_size :])
    keep = torch.ones(cells.shape[:2], dtype=torch.bool)
    keep[:, : shape.num_candidates] = select_survivors(parameters, scores, ranges, noise)
    return cells[keep].view(shape.num_kv_heads, parameters.budget, -1)


def bit_sums(cells: torch.Tensor) -> torch.Tensor:
    """The same for the same tokens, in whatever order: [H, n, 2 * D] -> [H, 2 * D] int64."""
    return cells.contiguous().view(torch.int16).long().sum(1)


def time_decode(shape: Shape, batch: int, device: torch.device) -> float | str | None:
    """Milliseconds of the attention of one decode step, all layers, over evicted pages.

    Returns:
        None where memory does not suffice, and the reason where there is no time.
    """
    if not is_installed():
        return "not installed"
    one_layer = replace(shape, num_due=batch, num_layers=1, block_size=BLOCK_SIZE)
    if not fits(2 * one_layer.cache_bytes, device):
        return None
    workload = Workload(one_layer, device)
    workload.evict()
    step = EvictedStep(workload)
    sizes = batch, shape.num_kv_heads, shape.group_size, shape.head_size
    query = torch.randn(sizes, device=device).to(shape.dtype)
    try:
        return shape.num_layers * milliseconds(prepare(step, query))
    except Exception as error:
        # A peer's failure must not cost the numbers of the others.
        return f"failed: {error}"[:120]


def is_installed() -> bool:
    """Whether xformers can be imported."""
    try:
        import xformers.ops  # noqa: F401
    except ImportError:
        return False
    return True


def cases() -> dict[str, Shape]:
    """Evictions by name: one that draws, one whose survivors no rounding can change."""
    drawn = Shape(parameters_of(256), num_due=4, num_layers=1, dtype=torch.float16)
    streaming = replace(drawn, parameters=unscored(drawn.parameters)["streaming"])
    return {"vase": drawn, "streaming": streaming}


def main() -> int:
    """1 if an output is not right; ``SKIPPED`` without xformers."""
    if not is_installed():
        print("xformers is not installed")
        return SKIPPED
    if not torch.cuda.is_available():
        print("no GPU: xformers has no paged attention on a CPU")
        return SKIPPED
    torch.manual_seed(0)
    failed = False
    for name, shape in cases().items():
        try:
            counts = wrong_outputs(shape, torch.device("cuda"), xformers_attention)
        except UnsupportedError as error:
            print(f"xformers {version('xformers')} cannot attend over pages here: {error}")
            return SKIPPED
        num_wrong, num_ties, num_heads = counts
        failed |= bool(num_wrong) or num_ties > MOST_AT_THRESHOLD * num_heads
        print(f"{name}: {num_wrong} wrong, {num_ties} ties at the threshold, of {num_heads} heads")
    print("FAILED: xformers sees other tokens than the reference keeps" if failed else "all right")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
