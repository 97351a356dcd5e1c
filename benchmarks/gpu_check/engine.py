"""A real engine with random weights evicts on an attention backend, with CUDA graphs as without.

    python -m benchmarks.gpu_check.engine --backend FLASH_ATTN

Three engines of one small model get the same requests: eager, with CUDA graphs around the same
kernels, and with everything that vLLM does by default. Each must pass its self-check at the start,
and evict as often as the schedule says. The tokens of the first two must agree: a graph that
replays lengths or pages of its capture gives others from the first eviction on. Rounding alone may
tip a token as well, or a draw, and all after it are others then; so half of all tokens must be the
same up to a request's first that is not. By default vLLM compiles the model as well, which rounds
otherwise from the first layer on: that agreement is printed and not judged.

A policy that the fused kernel does not know evicts in plain torch, which must not wait for the GPU.
"""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from benchmarks.common.checks import eviction_problems
from benchmarks.common.environment import IN_PROCESS
from benchmarks.common.exit_codes import SKIPPED
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.in_process_engine import running_engine
from vase_vllm.tools.tiny_model import make_tiny_model
from vase_vllm.worker.evictor import TorchEvictor

BUDGET, WINDOW = 64, 16
PROMPT_LENGTHS = (24, 60, 79, 80, 96, 130, 200, 300)
NUM_TOKENS = 96
LEAST_AGREEMENT = 0.5
NOT_VALID = "is not valid for this configuration"
"""What vLLM says of a backend that the device does not take, or that is not installed."""
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "CUDA graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "default": {},
}


def engine_args(model: Path, backend: str, mode: str, policy: str) -> EngineArgs:
    """The arguments of one engine."""
    eviction = {"policy": policy, "budget": BUDGET, "window": WINDOW}
    return EngineArgs(
        model=str(model),
        attention_backend=backend,
        max_model_len=512,
        max_num_seqs=16,
        kv_cache_memory_bytes=256 << 20,
        # What an engine before this one still holds is in the way of vLLM's default.
        gpu_memory_utilization=0.5,
        disable_log_stats=True,
        additional_config={"kv_eviction": eviction},
        **MODES[mode],
    )


def prompts() -> list[list[int]]:
    """Of different lengths, some of which evict in the prompt's first step after it."""
    return [[(7 * i + 3 * n) % 96 + 32 for i in range(n)] for n in PROMPT_LENGTHS]


def generate(llm: LLM, backend: str, mode: str) -> list[list[int]]:
    """The tokens of all requests.

    Raises:
        SystemExit: attention ran on another backend, or a GPU without CUDA graphs where they are
            asked for, or the evictions are not the schedule's.
    """
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    compilation = worker.vllm_config.compilation_config
    layers = compilation.static_forward_context.values()
    if (used := {layer.attn_backend.get_name() for layer in layers}) != {backend}:
        raise SystemExit(f"FAILED: attention runs on {', '.join(sorted(used))}, not on {backend}")
    graphs = compilation.cudagraph_mode.name
    if current_platform.is_cuda() and (graphs == "NONE") != (mode == "eager"):
        raise SystemExit(f"FAILED: {mode}, but CUDA graphs are {graphs}")
    print(f"CUDA graphs {graphs}, model runner {type(worker.model_runner).__module__}")
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts()]
    outputs = llm.generate(requests, params, use_tqdm=False)
    lengths = [(length, NUM_TOKENS) for length in PROMPT_LENGTHS]
    counted = llm.collective_rpc("get_kv_eviction_stats")[0]["evictions"]
    if wrong := eviction_problems(EvictionSchedule(BUDGET, WINDOW), lengths, counted):
        raise SystemExit(f"FAILED: {wrong[0]}")
    print(f"{counted} evictions, as the schedule says")
    return [list(output.outputs[0].token_ids) for output in outputs]


def never_waiting(evict: Callable[..., int]) -> Callable[..., int]:
    """An eviction in plain torch in which everything raises that waits for the GPU."""

    @functools.wraps(evict)
    def wrapper(*args: Any, **kwargs: Any) -> int:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return evict(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return wrapper


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    """Share of all tokens that stand in front of their request's first difference."""
    same = total = 0
    for left, right in zip(one, other, strict=True):
        different = (
            i for i, pair in enumerate(zip(left, right, strict=True)) if len(set(pair)) > 1
        )
        same += next(different, len(left))
        total += len(left)
    return same / total


def main() -> int:
    """1 if it does not evict as it should; ``SKIPPED`` where vLLM does not take the backend."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", required=True, help="vLLM's name of it")
    parser.add_argument("--policy", default="vase", help="that evicts")
    args = parser.parse_args()
    backend = args.backend
    os.environ.update(IN_PROCESS)
    if current_platform.is_cuda():
        TorchEvictor.evict = never_waiting(TorchEvictor.evict)
    tokens: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        # Half of the heads of Qwen3-8B; fp16 rounds less than bf16.
        model = make_tiny_model(
            directory, query_heads=16, kv_heads=4, head_dim=128, dtype="float16"
        )
        for mode in MODES:
            print(f"{backend}, {mode}", flush=True)
            try:
                with running_engine(engine_args(model, backend, mode, args.policy)) as llm:
                    tokens[mode] = generate(llm, backend, mode)
            except ValueError as error:
                if NOT_VALID not in str(error):
                    raise
                print(str(error).splitlines()[0])
                return SKIPPED
    shares = {mode: agreement(tokens["eager"], tokens[mode]) for mode in ("CUDA graphs", "default")}
    for mode, share in shares.items():
        print(f"{mode}: {share:.0%} of the tokens are those of the eager engine")
    if shares["CUDA graphs"] < LEAST_AGREEMENT:
        print(f"FAILED: with CUDA graphs {shares['CUDA graphs']:.0%} of the tokens are the same")
        return 1
    print("all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
