"""Engines in a process of their own, under Triton's interpreter and vLLM's model runner V2."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm import TokensPrompt

from tests.support.engines import engine, eviction_stats, greedy

ROOT = Path(__file__).parents[2]


def run_interpreted(
    model: Path, cases: Sequence[dict[str, Any]], *, triton_attention: bool
) -> list[dict[str, Any]]:
    """Generate under runner V2, each case in an engine of its own, all in one process.

    Args:
        cases: arguments of :func:`run_case`.
        triton_attention: put vLLM's Triton attention, with its GPU page layout, in the place of the
            CPU backend; the evictions then run in Triton too.

    Returns:
        What :func:`run_case` returns for each case, or {"error"} with the traceback.
    """
    arguments = json.dumps([str(model), triton_attention, list(cases)])
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted", arguments],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def environment() -> dict[str, str]:
    """Of a process with the interpreter and runner V2."""
    return {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": f"{ROOT / 'tests' / 'support' / 'runner_v2'}{os.pathsep}{ROOT}",
    }


def run_case(
    model: Path | str,
    *,
    eviction: dict[str, Any] | None,
    prompts: list[list[int]],
    num_tokens: int,
    options: dict[str, Any],
    warm_up: bool = False,
) -> dict[str, Any]:
    """Generate greedily in this process, with whatever runner and backend it has.

    Args:
        warm_up: first run vLLM's warm-up of the kernels, which the CPU worker leaves out.

    Returns:
        {"runner", "impl", "tokens", "cached", "stats"}.
    """
    with engine(model, eviction, **options) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        if warm_up:
            _warm_up(worker)
        layers = worker.vllm_config.compilation_config.static_forward_context
        requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = llm.generate(requests, greedy(num_tokens), use_tqdm=False)
        return {
            "runner": type(worker.model_runner).__module__,
            "impl": type(next(iter(layers.values())).impl).__name__,
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            # Of each prompt, the tokens found in the prefix cache.
            "cached": [output.num_cached_tokens for output in outputs],
            "stats": eviction_stats(llm) if eviction else None,
        }


def _warm_up(worker: Any) -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    # What the GPU worker's method does for runner V2, inside of what our worker adds to it; of it,
    # the part with greedy sampling, for the interpreter cannot run vLLM's other sampling kernels.
    original = CPUWorker.compile_or_warm_up_model
    CPUWorker.compile_or_warm_up_model = lambda self: run_mixed_prefill_decode_warmup(
        self.model_runner, self.execute_model, self.sample_tokens, num_tokens=35
    )
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    null_blocks = [layer.kv_cache[0] for layer in layers]
    assert not any(block.any() for block in null_blocks)
    try:
        assert worker.compile_or_warm_up_model(), "vLLM skipped its warm-up"
        assert not any(block.any() for block in null_blocks), "the null block was written"
    finally:
        CPUWorker.compile_or_warm_up_model = original


def use_triton_attention() -> None:
    """Put vLLM's Triton attention in the CPU backend's place, in this process."""
    import torch
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # The CPU platform asks for its own backend whatever one wants, and vLLM's Triton cache write
    # asks for the GPU's capability.
    register_backend(
        AttentionBackendEnum.CPU_ATTN,
        "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend",
    )
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    # Programs that share a sequence's keys. For these short ones most of 16 would find nothing to
    # do, and take two thirds of the interpreter's time.
    triton_attn.NUM_PAR_SOFTMAX_SEGMENTS = 2


def main() -> None:
    model, triton_attention, cases = json.loads(sys.argv[1])
    from tests.support import faster_interpreter

    faster_interpreter.install()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if triton_attention:
        use_triton_attention()
    results: list[dict[str, Any]] = []
    for case in cases:
        try:
            results.append(run_case(model, **case))
        except Exception:
            results.append({"error": traceback.format_exc()})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
