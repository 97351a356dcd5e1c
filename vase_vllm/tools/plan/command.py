"""The `plan` subcommand: its arguments and what it makes of them."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from vase_vllm.errors import EvictionError
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.arguments import choose_model
from vase_vllm.tools.plan.capacity import (
    MEMORY_UTILIZATION,
    Workload,
    kv_cache_memory,
    make_plan,
    parse_size,
)
from vase_vllm.tools.plan.gpus import GPUS
from vase_vllm.tools.plan.model_shape import DTYPES, read_model_shape
from vase_vllm.tools.plan.table import print_plan
from vase_vllm.tools.policy_label import parse_policy_label
from vase_vllm.tools.requirements import require

DEFAULT_BUDGETS = (2048, 4096, 6144)
DEFAULT_WINDOW = 64
"""As in :class:`~vase_vllm.config.EvictionConfig`, which cannot be imported without torch."""
DEFAULT_OUTPUT = 16384
MEMORY = ("gpu_memory", "kv_cache_memory", "other_memory")
LENGTHS = ("max_model_len", "mean_prompt_len", "mean_output_len")
SMALLEST_MEMORY = 2**20
"""Nobody means fewer bytes: a smaller number without a unit has lost it."""


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        metavar="MODEL",
        help="model directory or Hugging Face id, of which only the config is read; the same as "
        "MODEL without the flag",
    )
    add(
        "--gpu",
        type=str.lower,
        choices=sorted(GPUS),
        help="GPU: its data sheet gives the memory and the predicted tokens per second",
    )
    add("--gpu-memory", metavar="SIZE", help="memory of one GPU, such as 80GiB, 80G or 80GB")
    add(
        "--kv-cache-memory",
        metavar="SIZE",
        help="KV cache memory of one GPU, instead of --gpu-memory",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        default=MEMORY_UTILIZATION,
        metavar="F",
        help="share of the GPU memory that is used, as in vLLM",
    )
    add(
        "--other-memory",
        default="2GiB",
        metavar="SIZE",
        help="estimate for activations and CUDA graphs on one GPU; vLLM measures it at start-up",
    )
    add("--tensor-parallel-size", "-tp", type=int, default=1, metavar="N", help="GPUs per replica")
    add(
        "--budget",
        nargs="+",
        action="extend",
        metavar="T",
        help="budgets to compare, in tokens; None: " + ", ".join(map(str, DEFAULT_BUDGETS)),
    )
    add("--window", type=int, default=DEFAULT_WINDOW, metavar="W", help="tokens between evictions")
    add(
        "--policy",
        metavar="NAME[:KEY=VALUE,...]",
        help="eviction policy, for the memory of the numbers that it keeps of each token, such as "
        "h2o or distinct:memory=0.9; None: one that keeps none, as vase does",
    )
    add(
        "--keep-prompt",
        action="store_true",
        help="plan for --kv-eviction-config.prompt keep: prompts are held beside the budget",
    )
    add("--max-model-len", metavar="N", help="longest sequence in tokens; None: as in the config")
    add("--block-size", type=int, default=16, metavar="B", help="token slots per block")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of weights and KV cache")
    add("--mean-prompt-len", metavar="N", default="512", help="mean prompt length in tokens")
    add(
        "--mean-output-len",
        metavar="N",
        help=f"mean output length in tokens; None: {DEFAULT_OUTPUT}, within --max-model-len",
    )
    add("--max-num-seqs", type=int, metavar="N", help="most sequences per step; None: no limit")
    add("--json", action="store_true", help="print JSON instead of a table")


def run_plan(args: argparse.Namespace) -> int:
    args.model = choose_model("plan", args.model_tag, args.model)
    _check_numbers(args)
    sizes = {
        name: _size(text, flag(name))
        for name in (*MEMORY, *LENGTHS)
        if (text := getattr(args, name)) is not None
    }
    gpu = GPUS[args.gpu] if args.gpu else None
    if gpu is not None:
        sizes.setdefault("gpu_memory", int(gpu.memory))
    schedules = [
        _schedule(_size(text, "--budget"), args.window, args.keep_prompt)
        for text in args.budget or DEFAULT_BUDGETS
    ]
    model, longest = read_model_shape(args.model, args.dtype)
    tp = args.tensor_parallel_size
    memory = sizes.get("kv_cache_memory") or kv_cache_memory(
        sizes["gpu_memory"],
        args.gpu_memory_utilization,
        sizes["other_memory"],
        cdiv(model.weight_bytes, tp),
    )
    workload = _workload(args, sizes, longest, memory)
    for schedule in schedules:
        if reason := schedule.why_nothing_evicts(workload.max_model_len, "--budget"):
            raise ValueError(reason)
    numbers = _numbers_per_token(args.policy, schedules) if args.policy else 0
    plan = make_plan(model, tp, workload, schedules, gpu.machine if gpu else None, numbers)
    if args.json:
        print(json.dumps({"gpu": args.gpu, "workload": asdict(workload), **asdict(plan)}, indent=2))
    else:
        print_plan(plan, workload, args.model, tp, args.gpu)
    return 0


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_numbers(args: argparse.Namespace) -> None:
    if not (args.gpu or args.gpu_memory or args.kv_cache_memory):
        raise ValueError(
            "the memory is missing: give --gpu, such as --gpu h100, or --gpu-memory, such as "
            "--gpu-memory 80GiB, or --kv-cache-memory"
        )
    if args.gpu_memory and args.kv_cache_memory:
        raise ValueError("give one of --gpu-memory and --kv-cache-memory")
    for name in ("tensor_parallel_size", "window", "block_size", "max_num_seqs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{flag(name)} ({value}) must be at least 1")
    if not 0 < args.gpu_memory_utilization <= 1:
        raise ValueError(
            f"--gpu-memory-utilization ({args.gpu_memory_utilization}) must be above 0 and up to 1"
        )


def _workload(
    args: argparse.Namespace, sizes: dict[str, int], longest: int, memory: int
) -> Workload:
    max_model_len = sizes.get("max_model_len", longest)
    if max_model_len > longest:
        raise ValueError(f"--max-model-len ({max_model_len}) is above the config's {longest}")
    prompt = sizes["mean_prompt_len"]
    output = sizes.get("mean_output_len", min(DEFAULT_OUTPUT, max_model_len - prompt))
    if output < 1 or prompt + output > max_model_len:
        raise ValueError(
            f"--mean-prompt-len ({prompt}) + --mean-output-len ({output}) must be at most "
            f"--max-model-len ({max_model_len}), and the output at least 1"
        )
    return Workload(max_model_len, args.block_size, memory, prompt, output, args.max_num_seqs)


def _size(text: str | int, flag: str) -> int:
    try:
        size = parse_size(str(text))
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    if size < 1 and flag not in ("--other-memory", "--mean-prompt-len"):
        raise ValueError(f"{flag} ({text}) must be above 0")
    if flag.endswith("-memory") and 0 < size < SMALLEST_MEMORY and str(text).strip().isdigit():
        raise ValueError(f"{flag} {text} has no unit: write {flag} {text}GiB")
    return size


def _schedule(budget: int, window: int, keeps_prompt: bool) -> EvictionSchedule:
    if budget <= window:
        raise ValueError(
            f"--budget ({budget}) must be larger than --window ({window}): "
            "raise --budget or lower --window"
        )
    return EvictionSchedule(budget, window, keeps_prompt=keeps_prompt)


def _numbers_per_token(label: str, schedules: Sequence[EvictionSchedule]) -> int:
    """What a policy with these settings keeps of each token."""
    require("plan --policy", ["torch"])
    from vase_vllm.config import EvictionConfig

    name, settings = parse_policy_label(label)
    for schedule in schedules:
        common = {"policy": name, "budget": schedule.budget, "window": schedule.window}
        if twice := sorted(common.keys() & settings):
            raise ValueError(f"--policy {label}: remove {twice[0]}, which has a flag of its own")
        try:
            config = EvictionConfig.parse({**common, **settings})
        except EvictionError as error:
            raise EvictionError(f"--policy {label}: {error}") from None
    return config.policy.num_numbers
