"""The kernel configurations that are shipped, and their launches on tensors without storage."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.compiler import ASTSource

from vase_vllm.kernels.evict import PagedEviction
from vase_vllm.kernels.launch import DeviceLimits, Launch, ScoringTile, scoring_tile
from vase_vllm.kernels.parameters import EvictionParameters, ProtectBy, Sampling, Scoring
from vase_vllm.kernels.remap import BatchRemap
from vase_vllm.kernels.ring import TritonRingWrite
from vase_vllm.layout.block_table_row import BlockTableRow
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.token_state import TokenStateLayout

NUM_LAYERS, NUM_KV_HEADS, BUDGET, WINDOW = 36, 8, 4096, 64
ARCHITECTURES = {
    80: DeviceLimits(108, 163 * 1024, 8),
    90: DeviceLimits(132, 227 * 1024, 9),
    100: DeviceLimits(148, 227 * 1024, 10),
    120: DeviceLimits(170, 99 * 1024, 12),
}

TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Configuration:
    """A model's attention and its cache."""

    head_size: int
    group_size: int
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    sampling: Sampling = "gumbel"
    scoring: Scoring = "attention"
    protect_by: ProtectBy = "value_range"
    memory: float = 0.0
    strata: int = 1

    def tile(self, limits: DeviceLimits) -> ScoringTile:
        """The tile of its two scoring launches."""
        num_rows = self.group_size * WINDOW
        return scoring_tile(num_rows, self.head_size, self.dtype.itemsize, limits)

    @property
    def is_distinct(self) -> bool:
        """Whether it is the policy ``distinct``'s."""
        return self.protect_by == "distinctness"

    def repeats(self) -> bool:
        """Whether one before it differs in the query heads per KV head alone.

        Selecting, moving and remapping do not depend on these.
        """
        alike = [c for c in CONFIGURATIONS if replace(c, group_size=self.group_size) == self]
        return alike[0] != self

    def __str__(self) -> str:
        kind = self.sampling if self.scoring == "attention" else self.scoring
        if self.is_distinct:
            kind = "remembering" if self.memory else "distinct"
            kind += " strata" if self.strata > 1 else ""
        return (
            f"D={self.head_size} G={self.group_size} {TYPE_NAMES[self.dtype]} "
            f"block={self.block_size} {kind}"
        )


QWEN3_8B = Configuration(128, 4)
QWEN3_8B_DISTINCT = Configuration(128, 4, sampling="greedy", protect_by="distinctness")
QUICK = (
    QWEN3_8B,
    QWEN3_8B_DISTINCT,
    replace(QWEN3_8B_DISTINCT, memory=0.9),
    replace(QWEN3_8B_DISTINCT, strata=4),
    Configuration(128, 4, scoring="uniform"),
    Configuration(128, 4, sampling="greedy", scoring="age"),
)
CONFIGURATIONS = (
    *QUICK,
    Configuration(128, 4, block_size=128, sampling="greedy"),
    Configuration(128, 4, torch.float16, block_size=32),
    Configuration(128, 4, torch.float32, block_size=64),
    Configuration(128, 1),
    Configuration(128, 5),
    Configuration(128, 8),
    Configuration(128, 16),
    Configuration(64, 8),
    Configuration(96, 1),
    Configuration(192, 2),
    Configuration(256, 4),
    Configuration(256, 2, torch.float32),
    Configuration(256, 2, torch.float32, scoring="uniform"),
    Configuration(256, 2, torch.float32, sampling="greedy", scoring="age"),
    *(
        replace(shape, sampling="greedy", protect_by="distinctness")
        for shape in (
            Configuration(64, 8),
            Configuration(128, 4, torch.float32),
            Configuration(256, 4),
        )
    ),
    *(
        replace(shape, sampling="greedy", protect_by="distinctness", memory=0.9, strata=strata)
        for shape in (Configuration(256, 4), Configuration(256, 2, torch.float32))
        for strata in (1, 4)
    ),
)


def shipped_launches(configuration: Configuration, limits: DeviceLimits) -> Iterator[Launch]:
    """The launches of one step of a model with 8 KV heads and 36 layers, budget 4096."""
    head_size, group_size = configuration.head_size, configuration.group_size
    block_size = configuration.block_size
    attention, sinks = configuration.scoring == "attention", 4
    parameters = EvictionParameters(
        BUDGET,
        WINDOW,
        1024 if attention else sinks,
        sinks,
        # The policies' own: distinct alone does not smooth.
        smoothing=1 if configuration.is_distinct else 5,
        sampling=configuration.sampling,
        scoring=configuration.scoring,
        protect_by=configuration.protect_by,
        memory=configuration.memory,
        strata=configuration.strata,
    )
    cell_bytes = 2 * head_size * configuration.dtype.itemsize
    numbers = TokenStateLayout(parameters.num_numbers, BUDGET, block_size, cell_bytes)
    num_state_blocks = RingLayout(WINDOW, group_size, block_size).num_blocks + numbers.num_blocks

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    columns = BlockTableRow.NUM_HEADER + num_state_blocks + 40960 // block_size
    kv_cache = empty(1000, NUM_KV_HEADS, block_size, 2 * head_size, dtype=configuration.dtype)
    block_table = empty(128, columns)
    yield from PagedEviction(
        empty(NUM_LAYERS, dtype=torch.int64),
        kv_cache,
        empty(NUM_LAYERS),
        block_table,
        empty(1),
        empty(128),
        parameters,
        group_size=group_size,
        softmax_scale=head_size**-0.5,
        max_num_cached=BUDGET + WINDOW,
        slot_priority=empty(1, BUDGET) if configuration.scoring == "age" else None,
        nan_keys=empty(1),
    ).launches(limits)
    if not attention:
        # No queries are stored, and the remapping is the same.
        return
    query = empty(128, NUM_KV_HEADS * group_size, head_size, dtype=configuration.dtype)
    yield TritonRingWrite(
        empty(128, dtype=torch.int64),
        empty(129),
        empty(128),
        block_table,
        window=WINDOW,
    ).launch(kv_cache, query)
    yield BatchRemap(
        empty(129),
        empty(128),
        block_table,
        empty(128, dtype=torch.int64),
        empty(128),
        empty(128),
        empty(128, 40960 // block_size),
        window=WINDOW,
        block_size=kv_cache.shape[2],
    ).launch()


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton's launcher would compile for these arguments, and its options."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    arguments = dict(launch.arguments)
    for parameter in launch.kernel.params:
        name, value = parameter.name, arguments.pop(parameter.name)
        specialised = not parameter.do_not_specialize
        is_one = specialised and isinstance(value, int) and value == 1
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
            divisible = True
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = specialised and value % 16 == 0
        if divisible:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), arguments
