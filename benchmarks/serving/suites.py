"""What is run: models, policies and workloads. A new one is one more entry in a table here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.paths import MODELS


@dataclass(frozen=True)
class Policy:
    """One way to serve.

    Attributes:
        name: as the tables and plots call it.
        budget, window: of the eviction; no budget is the full cache.
        eviction: name of the eviction policy.
        arguments: further ones of ``vllm serve``.
    """

    name: str
    budget: int | None = None
    window: int = 64
    eviction: str = "vase"
    arguments: tuple[str, ...] = ()

    def serve_arguments(self) -> list[str]:
        """What distinguishes this policy's server; everything else is vLLM's default."""
        if self.budget is None:
            return list(self.arguments)
        eviction = ["--kv-eviction", self.eviction, "--kv-eviction-config.budget", str(self.budget)]
        return [*eviction, "--kv-eviction-config.window", str(self.window), *self.arguments]


@dataclass(frozen=True)
class Workload:
    """One load, the same for all policies. Lengths are in tokens.

    Attributes:
        question: what it is there to show.
        kv_tokens: tokens that the KV cache memory of every policy holds.
        max_model_len: longest sequence that the servers accept.
        output_len: mean length of the answers, which never end by themselves but for ``stops``.
        spread: answers are drawn uniformly from output_len * (1 - spread) to * (1 + spread).
        stops: token ids that end an answer. Tokens are then sampled, and nobody knows beforehand
            how long an answer will be; ``output_len`` is the longest.
        prefix_len: length of a prefix that all prompts share, beside their input_len.
        rounds: times that every policy runs, in turn.
        policies: names of those of the suite that it runs unless told otherwise; none is all.
    """

    name: str
    question: str
    kv_tokens: int
    max_model_len: int
    num_requests: int
    concurrency: int
    input_len: int
    output_len: int
    spread: float = 0.0
    stops: tuple[int, ...] = ()
    prefix_len: int = 0
    rounds: int = 3
    policies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """Workloads that share a model and policies.

    Attributes:
        model: arguments of ``make_tiny_model``, or the directory of a model's config, which is
            served with weights that are made up (``--load-format dummy``).
        environment: of the servers.
    """

    model: dict[str, Any] | Path
    policies: tuple[Policy, ...]
    workloads: tuple[Workload, ...]
    block_size: int
    environment: dict[str, str] = field(default_factory=dict)


# The attention of Qwen3-8B (32 query heads, 8 KV heads of size 128) in two layers with next to no
# weights around it: the KV cache is nearly all of the memory and most of the work.
CPU_MODEL = {
    "layers": 2,
    "hidden_size": 256,
    "query_heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 32768,
}
CPU_WORKLOADS = (
    Workload(
        "pressure",
        "many long answers in KV memory for about four of full length",
        kv_tokens=4 * 4128,
        max_model_len=4160,
        num_requests=32,
        concurrency=32,
        input_len=32,
        output_len=2560,
        spread=0.6,
        policies=("full", "vase-256", "vase-512"),
    ),
    Workload(
        "pressure-16k",
        "answers of 4k to 16k in memory for four of the longest, a quarter of the shortest kept",
        kv_tokens=4 * 16416,
        max_model_len=16448,
        num_requests=32,
        concurrency=32,
        input_len=32,
        output_len=10240,
        spread=0.6,
        rounds=1,
        policies=("full", "vase-1024"),
    ),
    Workload(
        "length",
        "time per token over the length of a single answer, memory in plenty",
        kv_tokens=2 * 16640,
        max_model_len=16640,
        num_requests=1,
        concurrency=1,
        input_len=32,
        output_len=16384,
        rounds=2,
        policies=("full", "vase-512"),
    ),
    Workload(
        "relaxed",
        "short answers and memory in plenty: eviction has nothing to win",
        kv_tokens=32768,
        max_model_len=1600,
        num_requests=192,
        concurrency=16,
        input_len=64,
        output_len=256,
        rounds=5,
        policies=("full", "vase-512"),
    ),
    Workload(
        "short-and-tight",
        "answers far below the budget in tight memory: reserving room costs more than preempting",
        kv_tokens=2048,
        max_model_len=1600,
        num_requests=64,
        concurrency=32,
        input_len=64,
        output_len=192,
        policies=("full", "vase-512", "vase-512-optimistic"),
    ),
    Workload(
        "chat",
        "short answers, and the server is not told that they are short",
        kv_tokens=8192,
        max_model_len=1600,
        num_requests=512,
        concurrency=32,
        input_len=64,
        output_len=1500,
        # Three letters of a vocabulary of bytes.
        stops=(65, 66, 67),
        policies=("full", "vase-512", "vase-512-expected", "vase-512-optimistic"),
    ),
    Workload(
        "shared-prefix",
        "a long prompt that all requests share, short answers: prefix caching does the work",
        kv_tokens=16384,
        max_model_len=1600,
        num_requests=48,
        concurrency=8,
        input_len=64,
        output_len=64,
        prefix_len=1024,
        policies=("full", "vase-512"),
    ),
)


def gpu_workloads(kv_tokens: int) -> tuple[Workload, ...]:
    """Long answers at a concurrency that doubles until memory is full under every policy.

    The full cache holds ``kv_tokens / (input_len + output_len)`` sequences to their end, a budget
    of 6144 about ``kv_tokens / 6208`` of any length.
    """
    return tuple(
        Workload(
            f"answers-{length // 1024}k-concurrency-{concurrency}",
            f"{concurrency} answers of {length} tokens at a time",
            kv_tokens=kv_tokens,
            max_model_len=1024 + length + 64,
            num_requests=2 * concurrency,
            concurrency=concurrency,
            input_len=1024,
            output_len=length,
        )
        for length in (16384, 32768)
        for concurrency in (8, 16, 32, 64, 128, 256)
    )


GPU_POLICIES = (Policy("full"), *(Policy(f"vase-{b}", b) for b in (2048, 4096, 6144)))

SUITES = {
    "cpu": Suite(
        model=CPU_MODEL,
        policies=(
            Policy("full"),
            *(Policy(f"vase-{b}", b) for b in (256, 512, 1024)),
            *(Policy(f"{name}-512", 512, eviction=name) for name in ("snapkv", "rkv", "cur")),
            *(
                Policy(f"vase-512-{rule}", 512, arguments=("--kv-eviction-config.admission", rule))
                for rule in ("expected", "optimistic")
            ),
        ),
        workloads=CPU_WORKLOADS,
        block_size=32,
        # One thread that no core is bound to: several engines on one machine then stay apart.
        environment={"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    ),
    # KV memory on a GPU of 80 GB: 48 GB (147,456 bytes a token) beside the 16 GB of Qwen3-8B's
    # weights, 38 GB (163,840 bytes a token) beside the 30 GB of Qwen3-14B's.
    "qwen3-8b": Suite(MODELS / "qwen3-8b", GPU_POLICIES, gpu_workloads(320 * 1024), block_size=16),
    "qwen3-14b": Suite(
        MODELS / "qwen3-14b", GPU_POLICIES, gpu_workloads(224 * 1024), block_size=16
    ),
}
