"""Real engines for the tests, in this process, and looks into vLLM's own bookkeeping."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.triton_utils import dispatcher
from vllm.v1.core.sched.scheduler import Scheduler

BLOCK_SIZE = 32
VOCAB_SIZE = 32768


@contextmanager
def engine(model: Path | str, eviction: dict[str, Any] | None, **options: Any) -> Iterator[LLM]:
    """An in-process engine, eager, fp32 unless told otherwise; ``eviction=None`` is full cache."""
    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": BLOCK_SIZE,
        "dtype": "float32",
        "max_num_batched_tokens": 256,
        "disable_log_stats": True,
    }
    make: type[LLM] = LLM
    if eviction is not None:
        # Here, for there are tests without anything of the plugin in their process.
        import vase_vllm

        make = vase_vllm.LLM
        own = dict(eviction)
        settings["kv_eviction"] = own.pop("policy", "vase")
        settings["kv_eviction_config"] = own
    try:
        with _shortcuts():
            llm = make(str(model), **(settings | options))
        try:
            yield llm
        finally:
            with _shortcuts():
                llm.llm_engine.engine_core.shutdown()
            del llm
    finally:
        # An engine that refuses to start leaves its process groups behind as well.
        release()


def release() -> None:
    """Free what an engine of this process that nobody refers to any more has left behind."""
    gc.collect()
    with _shortcuts():
        cleanup_dist_env_and_memory()


_modules_with_kernels: set[str] = set()


@contextmanager
def _shortcuts() -> Iterator[None]:
    """Leave out what takes most of a tiny engine's way up and down, and changes nothing.

    vLLM collects garbage nine times on that way; once will do. And it searches all modules for
    Triton kernels that have another implementation on a CPU; where none is new, it has done so.
    """
    rebind = dispatcher._rebind_kernels

    def rebind_in_new_modules(overrides: Any) -> None:
        if not _modules_with_kernels.issuperset(sys.modules):
            rebind(overrides)
            _modules_with_kernels.update(sys.modules)

    with (
        mock.patch.object(gc, "collect", return_value=0),
        mock.patch.object(dispatcher, "_rebind_kernels", rebind_in_new_modules),
    ):
        yield


def scheduler(llm: LLM) -> Scheduler:
    """The engine's own scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def num_used_blocks(llm: LLM) -> int:
    """Blocks in use, by vLLM's block pool; the null block does not count."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def eviction_stats(llm: LLM) -> dict[str, int]:
    """The worker's counters."""
    return llm.collective_rpc("get_kv_eviction_stats")[0]


def random_prompt(num_tokens: int, seed: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Token ids of the tiny models' vocabulary, no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab_size, (num_tokens,), generator=generator).tolist()


def greedy(max_tokens: int) -> SamplingParams:
    """Greedy decoding of exactly ``max_tokens`` tokens."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def generate(
    llm: LLM, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[list[int]]:
    """Token ids generated for each prompt."""
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def add_request(llm: LLM, request_id: str, prompt: list[int], params: SamplingParams, **kw: Any):
    """Queue a request without running the engine."""
    llm.llm_engine.add_request(request_id, TokensPrompt(prompt_token_ids=prompt), params, **kw)


def drain(llm: LLM) -> dict[str, list[int]]:
    """Run the engine until it is idle: request id to token ids."""
    return drain_counting_preemptions(llm)[0]


def drain_counting_preemptions(
    llm: LLM, max_steps: int = 20_000
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Run the engine until it is idle, or too long.

    Returns:
        Request id to token ids, and to how often the request was preempted.
    """
    finished: dict[str, list[int]] = {}
    preemptions: dict[str, int] = {}
    for _ in range(max_steps):
        if not llm.llm_engine.has_unfinished_requests():
            break
        for request in scheduler(llm).requests.values():
            # vLLM adds a suffix to the id that a request was queued with.
            preemptions[request.request_id.split("-")[0]] = request.num_preemptions
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
    return finished, preemptions
