"""One configuration: a server, lm-evaluation-harness against it, and whether the run counts."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.check import MODEL
from benchmarks.accuracy.methods import Method
from benchmarks.common.checks import eviction_problems
from benchmarks.common.environment import KEEP_ALIVE, ONE_THREAD
from benchmarks.common.policy import Policy
from benchmarks.common.server import evictions_so_far, running_server
from vase_vllm.tools.server import Server

HERE = Path(__file__).parent
TASK = "vase_walks"
CONCURRENCY = 64
ENVIRONMENT = {**ONE_THREAD, **KEEP_ALIVE}
CLIENT_ENVIRONMENT = {"TQDM_DISABLE": "1", "LMEVAL_LOG_LEVEL": "ERROR"}
"""The progress bar is ours; it has to be set before a client process imports tqdm."""
SERVE_ARGUMENTS = (
    *("--served-model-name", TASK, "--enforce-eager", "--block-size", "32"),
    *("--kv-cache-memory-bytes", "256M", "--max-num-seqs", str(CONCURRENCY)),
)


@dataclass(frozen=True)
class Configuration:
    """What one server is asked. ``compression`` and ``budget`` are None for the full cache."""

    method: Method
    compression: int | None
    budget: int | None
    seed: int

    @property
    def policy(self) -> Policy:
        """How it is served."""
        return self.method.at(self.budget, self.seed)

    @property
    def key(self) -> tuple[str, int | None, int]:
        return self.method.name, self.compression, self.seed

    def __str__(self) -> str:
        compression = f" {self.compression}x" if self.compression else ""
        return f"{self.method.name}{compression}" + (f" seed {self.seed}" if self.seed else "")


def prepare_client() -> None:
    """Run once in each client process: importing lm-eval takes longer than most of its work."""
    import lm_eval  # noqa: F401


def ask(url: str, limit: int | None) -> list[dict[str, Any]]:
    """The first ``limit`` problems to the server at ``url``, by lm-evaluation-harness.

    Returns:
        For each problem the completion, the prompt's words and the marks of ``grading.grade``.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model="local-completions",
        model_args={
            "model": TASK,
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "none",
            "tokenized_requests": False,
            "num_concurrent": CONCURRENCY,
            "timeout": 3600,
            "max_retries": 1,
        },
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(HERE), include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    return [
        {
            "prompt": sample["doc"]["prompt"],
            "completion": sample["resps"][0][0],
            "marks": {name: sample[name] for name in sample["metrics"]},
        }
        for sample in samples
    ]


def finished_requests(server: Server) -> int:
    """Requests that the server has answered so far."""
    samples = server.metrics()["vllm:request_success"].samples
    return int(sum(s.value for s in samples if s.name == "vllm:request_success_total"))


def problems_with(
    configuration: Configuration,
    samples: list[dict[str, Any]],
    asked: int,
    most_tokens: int,
    evictions: int | None,
) -> list[str]:
    """Everything that is wrong with a run; an empty list is a run that counts."""
    found = []
    if len(samples) != asked:
        found.append(f"{len(samples)} of {asked} problems answered")
    prompts = [1 + len(sample["prompt"].split()) for sample in samples]
    words = [len(sample["completion"].split()) for sample in samples]
    # A word is a token; the end-of-sequence token, which ends a completion, is no word.
    completions = [min(count + 1, most_tokens) for count in words]
    lengths = zip(prompts, completions, strict=True)
    return found + eviction_problems(configuration.policy.schedule, lengths, evictions)


def evaluate(
    configuration: Configuration,
    limit: int,
    most_tokens: int,
    clients: Executor,
    watch: Callable[[str, int], None],
) -> dict[str, Any]:
    """Start a server, put the problems to it, check the run; never raises for what they do.

    Args:
        clients: processes that ran ``prepare_client``.
        watch: called about every second with what is going on and the problems finished.

    Returns:
        ``status`` is "ok", "failed" (the server crashed or refused, or the client gave up) or
        "wrong" (the check failed), the latter two with the ``reason`` and without marks.
        ``marks`` is a list over the problems for each mark.
    """
    method = configuration.method
    arguments = [*SERVE_ARGUMENTS, *configuration.policy.serve_arguments()]
    result: dict[str, Any] = {
        "method": method.name,
        "compression": configuration.compression,
        "budget": configuration.budget,
        "seed": configuration.seed,
        "serve_arguments": shlex.join(arguments),
    }
    started = time.monotonic()
    watch("starting", 0)
    try:
        with running_server(MODEL, arguments) as server:
            answers: Future[list[dict[str, Any]]] = clients.submit(ask, server.url, limit)
            while not wait([answers], timeout=1).done:
                watch("answering", finished_requests(server))
            samples = answers.result()
            evictions = evictions_so_far(server)
    except Exception as error:  # whatever it is, the other configurations are still to be measured
        return result | {"status": "failed", "reason": str(error)[-1500:]}
    result |= {"seconds": round(time.monotonic() - started, 1), "evictions": evictions}
    if wrong := problems_with(configuration, samples, limit, most_tokens, evictions):
        return result | {"status": "wrong", "reason": "; ".join(wrong)}
    names = samples[0]["marks"]
    marks = {name: [round(s["marks"][name], 4) for s in samples] for name in names}
    return result | {"status": "ok", "problems": len(samples), "marks": marks}
