"""What one eviction costs on a CPU, by policy: milliseconds of one layer of one sequence.

    python -m benchmarks.decode_step.policies [--budgets 512 4096] [--output FILE.json]

In plain torch on one thread, on packed pages as vLLM's CPU backend has them. Times are processor
time of the process, which other jobs on the machine disturb least, and the policies take turns, so
that a machine that slows down slows all of them. The statistics of ``triattention`` are random
numbers.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.common import paths
from benchmarks.common.provenance import provenance
from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.block_table_row import RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.policies.query_statistics import QueryStatistics, rotation_pairs
from vase_vllm.policies.registry import policy_names
from vase_vllm.tools.markdown import table
from vase_vllm.tools.policy_label import parse_policy_label
from vase_vllm.worker.evictor import TorchEvictor
from vase_vllm.worker.pages import cpu_page_layout

HEADS, GROUP, HEAD_SIZE, WINDOW, BLOCK_SIZE = 8, 4, 128, 64, 32
"""Of Qwen3-8B."""
INSTRUCTION_SET = "vec"
REMEMBERING = "distinct:memory=0.9"
RESULTS = paths.RESULTS / "decode_step" / "policies.json"


class Case:
    """One sequence in the pages of one layer, of random numbers, that evicts again and again.

    Args:
        label: of the policy, ``NAME`` or ``NAME:KEY=VALUE,...``.
        query_statistics: a file, for ``triattention``.
    """

    def __init__(self, label: str, budget: int, dtype: torch.dtype, query_statistics: Path) -> None:
        policy, settings = parse_policy_label(label)
        if policy == "triattention":
            settings["statistics"] = str(query_statistics)
        common = {"policy": policy, "budget": budget, "window": WINDOW}
        config = EvictionConfig.parse({**common, **settings})
        ring = RingLayout(WINDOW, GROUP, BLOCK_SIZE)
        num_state_blocks = config.num_state_blocks(GROUP, BLOCK_SIZE, HEAD_SIZE, dtype)
        spec = EvictionSpec(
            block_size=BLOCK_SIZE,
            num_kv_heads=HEADS,
            head_size=HEAD_SIZE,
            dtype=dtype,
            schedule=config.schedule,
            num_state_blocks=num_state_blocks,
        )
        self._evictor = TorchEvictor(
            config,
            spec,
            ring,
            cpu_page_layout(INSTRUCTION_SET, BLOCK_SIZE, HEAD_SIZE, dtype),
            HEAD_SIZE**-0.5,
            torch.arange(HEADS),
        )
        self._position = first = config.schedule.bound
        num_blocks = num_state_blocks + cdiv(first, BLOCK_SIZE)
        shape = (1 + num_blocks, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        self._caches = {0: torch.randn(shape).to(dtype)}
        self._header = RowHeader(first, key=7, budget=budget, kept=0)
        self._row = torch.tensor([*self._header, *range(1, 1 + num_blocks)], dtype=torch.int32)

    def milliseconds(self) -> float:
        """Of processor time, of one eviction."""
        start = time.process_time()
        self._evictor.evict(self._caches, self._row, self._header, self._position)
        self._position += WINDOW
        return 1e3 * (time.process_time() - start)


def random_statistics() -> QueryStatistics:
    """Of the queries of one layer."""
    mean = torch.randn(1, HEADS * GROUP, HEAD_SIZE // 2, dtype=torch.complex64)
    return QueryStatistics(
        mean=mean,
        mean_length=2 * mean.abs(),
        frequencies=torch.rand(1, HEAD_SIZE // 2, dtype=torch.float64),
        pairs=rotation_pairs(HEAD_SIZE, HEAD_SIZE, is_neox_style=True),
        num_kv_heads=HEADS,
    )


def measure(policies: list[str], budget: int, repeats: int, dtype: torch.dtype) -> dict[str, float]:
    """The median of each policy, after an eviction that is not counted."""
    with tempfile.TemporaryDirectory(prefix="query-statistics-") as directory:
        file = Path(directory) / "random.safetensors"
        random_statistics().save(file)
        cases = {label: Case(label, budget, dtype, file) for label in policies}
    times: dict[str, list[float]] = {label: [] for label in policies}
    for _ in track(range(1 + repeats), f"budget {budget}", transient=True):
        for name, case in cases.items():
            times[name].append(case.milliseconds())
    return {name: round(statistics.median(found[1:]), 2) for name, found in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=sorted([*policy_names(), REMEMBERING]))
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    found = {b: measure(args.policies, b, args.repeats, dtype) for b in args.budgets}
    shape = {"kv_heads": HEADS, "group": GROUP, "head_size": HEAD_SIZE, "window": WINDOW}
    result = {**provenance(), **shape, "dtype": args.dtype, "milliseconds_per_layer": found}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    rows = [
        [name, *(str(found[budget][name]) for budget in args.budgets)] for name in args.policies
    ]
    heads = ["policy", *(f"ms per layer, budget {budget}" for budget in args.budgets)]
    Console(soft_wrap=True).print("\n".join(table(heads, rows)), markup=False)


if __name__ == "__main__":
    main()
