"""What is run: models, policies and workloads. A new one is one more entry in a table here."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common.environment import KEEP_ALIVE, ONE_THREAD
from benchmarks.common.paths import MODELS
from benchmarks.common.policy import Policy
from benchmarks.common.workload import Workload


@dataclass(frozen=True)
class Suite:
    """Workloads that share a model and policies.

    Attributes:
        model: arguments of ``make_tiny_model``, or the directory of a model's config, which is
            served with dummy weights (``--load-format dummy``).
        block_size: token slots of a KV cache block.
        dtype: of the weights and the KV cache, as ``vllm serve --dtype`` takes it.
        config_changes: of that config.
        environment: of the servers.
        arguments: of ``vllm serve``, for all policies.
        needs_gpu: whether it is for a GPU.
        smoke: whether it is there to go through every step, so that its numbers mean nothing.
        sample_seconds: between two samples of a server's metrics.
    """

    model: dict[str, Any] | Path
    policies: tuple[Policy, ...]
    workloads: tuple[Workload, ...]
    block_size: int
    dtype: str = "auto"
    config_changes: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    needs_gpu: bool = False
    smoke: bool = False
    sample_seconds: float = 0.5

    @property
    def model_in_results(self) -> str | dict[str, Any]:
        """What results say of the model: its arguments, or the name of its shape."""
        if self.smoke:
            return "a tiny model"
        return self.model.name if isinstance(self.model, Path) else self.model


def budget_policies(*budgets: int, window: int | None = None) -> tuple[Policy, ...]:
    """The full cache, and ``vase`` with each budget; ``window`` is part of their names if given."""
    suffix = "" if window is None else f"-window-{window}"
    settings = () if window is None else (("window", str(window)),)
    evicting = (Policy(f"vase-{b}{suffix}", b, settings=settings) for b in budgets)
    return (Policy("full"), *evicting)


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
PRESSURE_16K = Workload(
    "pressure-16k",
    "outputs of 4k to 16k in memory for four of the longest, a quarter of the shortest kept",
    kv_tokens=4 * 16416,
    max_model_len=16448,
    num_requests=32,
    concurrency=32,
    input_len=32,
    output_len=10240,
    spread=0.6,
    rounds=1,
    policies=("full", "vase-1024"),
)
CPU_WORKLOADS = (
    Workload(
        "pressure",
        "many long outputs in KV memory for about four of full length",
        kv_tokens=4 * 4128,
        max_model_len=4160,
        num_requests=32,
        concurrency=32,
        input_len=32,
        output_len=2560,
        spread=0.6,
        policies=("full", "vase-256", "vase-512", "vase-512-reserve"),
    ),
    PRESSURE_16K,
    Workload(
        "length",
        "time per token over the length of a single output, memory in plenty",
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
        "short outputs and memory in plenty: eviction cannot gain anything",
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
        "outputs far below the budget in tight memory: reserving room costs more than preempting",
        kv_tokens=2048,
        max_model_len=1600,
        num_requests=64,
        concurrency=32,
        input_len=64,
        output_len=192,
        policies=("full", "vase-512", "vase-512-reserve", "vase-512-optimistic"),
    ),
    Workload(
        "chat",
        "short outputs, and the server is not told that they are short",
        kv_tokens=8192,
        max_model_len=1600,
        num_requests=512,
        concurrency=32,
        input_len=64,
        output_len=1500,
        # Three letters of a vocabulary of bytes.
        stops=(65, 66, 67),
        policies=("full", "vase-512", "vase-512-reserve", "vase-512-optimistic"),
    ),
    Workload(
        "shared-prefix",
        "a long prompt that all requests share, short outputs: prefix caching does the work",
        kv_tokens=16384,
        max_model_len=2304,
        num_requests=48,
        concurrency=8,
        input_len=64,
        output_len=64,
        prefix_len=1024,
        # Under a budget of 2048 the outputs end before they could evict.
        policies=("full", "vase-512", "vase-512-keep", "vase-2048"),
    ),
)

AGENTS = Workload(
    "agents",
    "long prompts, as of agents whose tools have answered, and outputs of medium length",
    kv_tokens=8 * 2048,
    max_model_len=2432,
    num_requests=32,
    concurrency=32,
    input_len=1024,
    output_len=512,
    input_spread=0.5,
    spread=0.5,
    policies=("full", "vase-512", "vase-512-keep"),
)
QUESTIONS = replace(
    AGENTS,
    name="questions",
    question="short prompts, short outputs",
    num_requests=64,
    input_len=64,
    output_len=192,
)
REASONING = replace(
    QUESTIONS,
    name="reasoning",
    question="short prompts, long outputs",
    num_requests=16,
    output_len=1536,
)
MIXED = replace(
    AGENTS,
    name="mixed",
    question="questions, reasoning and agents at once",
    num_requests=AGENTS.num_requests + QUESTIONS.num_requests + REASONING.num_requests,
    input_len=338,
    output_len=476,
    mixture=(AGENTS, QUESTIONS, REASONING),
    policies=("full", "vase-512", "vase-512-reserve"),
)
MIXED_OPT_OUT = replace(
    MIXED,
    name="mixed-opt-out",
    question="questions, reasoning and agents at once, and the agents opt out of eviction",
    mixture=(replace(AGENTS, opts_out=True), QUESTIONS, REASONING),
    policies=("full", "vase-512"),
)


def gpu_workloads(kv_tokens: int) -> tuple[Workload, ...]:
    """Long outputs at a concurrency that doubles until memory is full under every policy.

    The full cache holds ``kv_tokens / (input_len + output_len)`` sequences to their end, a budget
    of 6144 about ``kv_tokens / 6208`` of any length.
    """
    return tuple(
        Workload(
            f"outputs-{length // 1024}k-concurrency-{concurrency}",
            f"{concurrency} outputs of {length} tokens at a time",
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


def sweep(
    concurrency: int = 16,
    max_concurrency: int = 1024,
    input_len: int = 1024,
    output_len: int = 16384,
    waves: int = 1,
    kv_tokens: int | None = None,
    rounds: int = 3,
) -> Workload:
    """Outputs of one length at a concurrency that doubles until it brings nothing more.

    Args:
        concurrency, max_concurrency: the first, and the largest.
        input_len: mean length of the prompts; they are half as long to one and a half times.
        waves: requests for each concurrent client.
    """
    return Workload(
        f"outputs-{output_len}",
        f"outputs of {output_len} tokens at a concurrency that doubles",
        kv_tokens=kv_tokens,
        max_model_len=input_len + input_len // 2 + output_len + 64,
        num_requests=waves * concurrency,
        concurrency=concurrency,
        max_concurrency=max_concurrency,
        input_len=input_len,
        output_len=output_len,
        input_spread=0.5,
        rounds=rounds,
    )


# Layers with next to no weights, and 4 KB of KV cache for each token in each, in fp32: what is done
# for each sequence and layer takes more of a step than where four query heads share a KV head.
SMALL_LAYERS = {
    "layers": 4,
    "hidden_size": 512,
    "query_heads": 8,
    "kv_heads": 8,
    "head_dim": 64,
    "intermediate_size": 1024,
    "dtype": "float32",
}
ALIKE = Workload(
    "alike",
    "24 long outputs of one length in KV memory for four of them",
    kv_tokens=4 * 4032,
    max_model_len=4064,
    num_requests=24,
    concurrency=24,
    input_len=32,
    output_len=4000,
    rounds=1,
)
# The attention of DeepSeek-R1-Distill-Qwen-1.5B (12 query heads, 2 KV heads of size 128) in a
# single layer, in fp32: an eighth of the KV cache of ``CPU_MODEL`` in fp32, for a slow processor.
FEW_KV_HEADS = CPU_MODEL | {"layers": 1, "query_heads": 12, "kv_heads": 2, "dtype": "float32"}
PAIR_RELAXED = Workload(
    "relaxed-gpu",
    "short outputs and memory in plenty: eviction cannot gain anything",
    kv_tokens=160 * 1024,
    max_model_len=4928,
    num_requests=64,
    concurrency=64,
    input_len=512,
    output_len=256,
    input_spread=0.5,
    rounds=8,
)
PAIR_WORKLOADS = (
    PAIR_RELAXED,
    replace(
        PAIR_RELAXED,
        name="pressure-gpu",
        question="128 outputs of 4,096 tokens in KV memory for 35 of them",
        num_requests=128,
        concurrency=128,
        output_len=4096,
        rounds=1,
    ),
)
GPU_POLICIES = budget_policies(2048, 4096, 6144)
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}

SUITES = {
    "cpu": Suite(
        model=CPU_MODEL,
        policies=(
            *budget_policies(256, 512, 1024, 2048),
            Policy("vase-512-keep", 512, settings=(("prompt", "keep"),)),
            *(Policy(f"{name}-512", 512, name) for name in ("snapkv", "rkv", "cur")),
            *(
                Policy(f"vase-512-{rule}", 512, settings=(("admission", rule),))
                for rule in ("reserve", "optimistic")
            ),
        ),
        workloads=(*CPU_WORKLOADS, AGENTS, MIXED, MIXED_OPT_OUT),
        block_size=32,
        environment=ONE_THREAD | KEEP_ALIVE,
    ),
    **{
        name: Suite(
            model,
            budget_policies(budget),
            (workload,),
            block_size=32,
            # Else vLLM loads fp32 weights as bf16.
            dtype="float32",
            environment=ONE_THREAD | KEEP_ALIVE,
        )
        for name, model, budget, workload in (
            ("small-layers", SMALL_LAYERS, 512, ALIKE),
            ("few-kv-heads", FEW_KV_HEADS, 1024, replace(PRESSURE_16K, rounds=3)),
        )
    },
    # KV memory on a GPU of 80 GB: 48 GB (147,456 bytes a token) beside the 16 GB of Qwen3-8B's
    # weights, 38 GB (163,840 bytes a token) beside the 30 GB of Qwen3-14B's.
    **{
        model: Suite(
            MODELS / model, GPU_POLICIES, gpu_workloads(kv_tokens), block_size=16, needs_gpu=True
        )
        for model, kv_tokens in (("qwen3-8b", 320 * 1024), ("qwen3-14b", 224 * 1024))
    },
    **{
        f"sweep-{model}": Suite(
            MODELS / model, GPU_POLICIES, (sweep(),), block_size=16, needs_gpu=True
        )
        for model in ("qwen3-8b", "qwen3-14b")
    },
    # For a GPU that is lent for minutes: KV memory for 71 sequences of full length, or 269 under
    # eviction, on every GPU of 80 GB and more.
    "sweep-qwen3-8b-small": Suite(
        MODELS / "qwen3-8b",
        budget_policies(1024),
        (sweep(128, 256, input_len=512, output_len=4096, kv_tokens=320 * 1024, rounds=1),),
        block_size=16,
        needs_gpu=True,
    ),
    # For a GPU that is lent for minutes, with room for both servers: 2 times 16 GB of weights and
    # 24 GB of KV cache, for 35 sequences of the longest or 135 under eviction.
    "pair-qwen3-8b": Suite(
        MODELS / "qwen3-8b",
        budget_policies(1024),
        PAIR_WORKLOADS,
        block_size=16,
        arguments=("--gpu-memory-utilization", "0.45"),
        needs_gpu=True,
    ),
    # Memory for three outputs of full length, so that a sweep on a CPU comes to its end as well.
    "smoke": Suite(
        model=MODELS / "qwen3-8b",
        config_changes=TINY,
        policies=budget_policies(64, window=16),
        workloads=(sweep(2, 4, input_len=24, output_len=400, kv_tokens=3 * 424, rounds=1),),
        block_size=32,
        environment=ONE_THREAD,
        # Where vLLM allows it, the worker is no process of its own, which would import vLLM too.
        arguments=("--enforce-eager", "--distributed-executor-backend", "uni"),
        smoke=True,
        sample_seconds=0.05,
    ),
}
