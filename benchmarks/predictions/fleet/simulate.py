"""How many GPUs a load of reasoning requests needs, with the full cache and with eviction.

    python -m benchmarks.predictions.fleet.simulate

A discrete-event simulation (simpy) on the closed form of vase_vllm/tools/plan/cost.py: predictions,
nothing here is measured on a GPU. The same seed gives the same numbers.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common.paths import MODELS, RESULTS
from benchmarks.predictions.fleet import report
from benchmarks.predictions.fleet.fleet import Clock, Outcome, simulate, smallest_fleet
from benchmarks.predictions.fleet.load import Lengths, Load
from benchmarks.predictions.fleet.replica import Settings
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.plan.capacity import kv_cache_memory
from vase_vllm.tools.plan.cost import Shard, mean_cached
from vase_vllm.tools.plan.gpus import GPUS
from vase_vllm.tools.plan.model_shape import read_model_shape

OTHER_MEMORY = 2 << 30
MEMORY_UTILIZATION = 0.9


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=str(MODELS / "qwen3-8b"), help="directory of a config")
    add("--gpu", choices=sorted(GPUS), default="h100")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of a replica")
    add("--budgets", type=int, nargs="+", default=[2048, 4096], metavar="T")
    add("--window", type=int, default=64, metavar="W")
    add("--rates", type=float, nargs="+", default=[0.5, 1, 2, 4], metavar="R", help="requests/s")
    add("--target-ms", type=float, default=50.0, help="95 %% of requests: ms per output token")
    add("--output-median", type=float, default=8000.0, help="tokens of an output")
    add("--output-sigma", type=float, default=0.8, help="spread of its logarithm")
    add("--prompt-median", type=float, default=300.0, help="tokens of a prompt")
    add("--max-model-len", type=int, default=32768, metavar="N")
    add("--max-num-seqs", type=int, default=256, metavar="N")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=RESULTS / "predictions" / "fleet", metavar="DIR")
    return parser.parse_args()


def make_settings(
    args: argparse.Namespace, shard: Shard, schedule: EvictionSchedule | None
) -> Settings:
    gpu, block_size = GPUS[args.gpu], 16
    memory = kv_cache_memory(
        int(gpu.memory), MEMORY_UTILIZATION, OTHER_MEMORY, round(shard.weight_bytes)
    )
    state_blocks = 0
    if schedule is not None:
        state_blocks = RingLayout(args.window, shard.group_size, block_size).num_blocks
    return Settings(
        shard=shard,
        machine=gpu.machine,
        num_blocks=memory // (shard.kv_bytes_per_token * block_size),
        block_size=block_size,
        max_num_seqs=args.max_num_seqs,
        schedule=schedule,
        state_blocks=state_blocks,
    )


def make_load(args: argparse.Namespace, rate: float) -> Load:
    prompts = Lengths(args.prompt_median, 0.7, args.max_model_len // 8)
    longest = args.max_model_len - prompts.longest
    return Load(rate, prompts, Lengths(args.output_median, args.output_sigma, longest))


def guess(settings: Settings, load: Load) -> int:
    """Replicas that would just carry the load with memory full; where the search starts."""
    output = load.outputs.median * 1.2
    cached = mean_cached(round(load.prompts.median), round(output), settings.schedule)
    blocks = cached / settings.block_size + settings.state_blocks
    batch = min(settings.max_num_seqs, settings.num_blocks / blocks)
    step = settings.shard.step(batch, cached, settings.schedule).seconds(settings.machine)
    return max(1, round(load.rate * output * step / batch))


def main() -> int:
    args = parse()
    shard = Shard(read_model_shape(args.model)[0], args.tensor_parallel_size)
    policies: dict[str, EvictionSchedule | None] = {"full cache": None}
    policies |= {f"budget {n}": EvictionSchedule(n, args.window) for n in args.budgets}
    clock, console = Clock(), Console(stderr=True)
    results = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("fleets", total=len(args.rates) * len(policies))
        for rate in args.rates:
            load = make_load(args, rate)
            for policy, schedule in policies.items():
                settings = make_settings(args, shard, schedule)

                def run(
                    number: int,
                    settings: Settings = settings,
                    load: Load = load,
                    policy: str = policy,
                ) -> Outcome:
                    text = f"{load.rate:g} requests/s, {policy}, {number} replicas"
                    progress.update(task, description=text)
                    return simulate(settings, load, number, clock, args.seed)

                tried = smallest_fleet(run, args.target_ms / 1e3, guess(settings, load))
                results.append(
                    {
                        "rate": rate,
                        "policy": policy,
                        "gpus": tried[-1].num_replicas * args.tensor_parallel_size,
                        "tried": [asdict(outcome) for outcome in tried],
                    }
                )
                progress.advance(task)
    settings_used = {name: value for name, value in vars(args).items() if name != "output"}
    settings_used["model"] = Path(args.model).name
    text = report.write(args.output, settings_used, results)
    Console().print(Markdown(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
