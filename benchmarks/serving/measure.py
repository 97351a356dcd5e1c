"""One policy's server for a workload: started, warmed up, loaded, watched and checked."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import checks
from benchmarks.common.dummy_weights import write_dummy_model
from benchmarks.common.load import RunFailedError, by_client, run_load, time_per_token
from benchmarks.common.monitor import Monitor, thinned
from benchmarks.common.policy import Policy
from benchmarks.common.server import (
    ERROR,
    blocks_left,
    evictions_so_far,
    running_server,
    settings_in_effect,
)
from benchmarks.common.workload import SEED, WARM_UP_SEED, Workload, draw_requests
from benchmarks.serving.suites import Suite
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.tools.plan.cost import Shard
from vase_vllm.tools.plan.model_shape import read_model_shape
from vase_vllm.tools.server import Server
from vase_vllm.tools.tiny_model import make_tiny_model

DETAILS = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "errors", "generated_texts")
SERIES_POINTS = 200
Run = dict[str, Any]


def prepare_model(suite: Suite, directory: Path) -> list[str]:
    """Write the suite's model to ``directory``; returns what ``vllm serve`` needs to load it."""
    if isinstance(suite.model, Path):
        write_dummy_model(directory, suite.model, suite.config_changes)
        return ["--load-format", "dummy"]
    make_tiny_model(directory, **suite.model)
    return []


def kv_memory_bytes(kv_tokens: int, shard: Shard, block_size: int) -> int:
    """KV cache memory that holds so many tokens, and vLLM's null block."""
    return (cdiv(kv_tokens, block_size) + 1) * block_size * shard.kv_bytes_per_token


def serve_arguments(suite: Suite, workload: Workload, policy: Policy, shard: Shard) -> list[str]:
    """Arguments of ``vllm serve``, beside those that load the model."""
    arguments = ["--max-model-len", str(workload.max_model_len)]
    arguments += ["--block-size", str(suite.block_size)]
    if suite.dtype != "auto":
        arguments += ["--dtype", suite.dtype]
    if workload.kv_tokens is not None:
        num_bytes = kv_memory_bytes(workload.kv_tokens, shard, suite.block_size)
        arguments += ["--kv-cache-memory-bytes", str(num_bytes)]
    return [*arguments, *suite.arguments, *policy.serve_arguments()]


@dataclass(frozen=True)
class Service:
    """A server that is warm.

    Attributes:
        arguments: that it was started with.
        settings: what vLLM made of its defaults.
        full_cache_count: evictions that the full cache's server counts, which should be None.
        log_start: characters of its log that are not judged.
    """

    suite: Suite
    workload: Workload
    policy: Policy
    model: Path
    shard: Shard
    server: Server
    arguments: list[str]
    settings: dict[str, str]
    full_cache_count: int | None = None
    log_start: int = 0

    def evictions(self) -> int | None:
        """Evictions so far."""
        if self.policy.budget is None:
            return self.full_cache_count
        return evictions_so_far(self.server)

    def measure(
        self,
        concurrency: int,
        timeout: float,
        watch: Callable[[Monitor], None],
        seed: int = SEED,
    ) -> Run:
        """Load the server, watch it and check what it did.

        Args:
            concurrency: requests at a time.
            timeout: seconds that the load may take.
            watch: called about twice a second meanwhile.
            seed: of the requests; in a sweep, at its first concurrency.

        Returns:
            ``status`` is "ok", or "wrong" with the ``reason`` and without a speed.

        Raises:
            RunTimeoutError: it took longer.
            RunFailedError: the load failed.
        """
        run = self.workload.at(concurrency)
        # A server sees each seed once, or its prefix cache would know the prompts.
        requests = draw_requests(run, seed * concurrency // self.workload.concurrency)
        before = self.evictions()
        begin = time.monotonic()
        with Monitor(self.server, self.suite.sample_seconds) as monitor:
            load = run_load(
                self.server,
                requests,
                concurrency,
                self.model,
                timeout,
                run.stops,
                lambda: watch(monitor),
            )
        seconds = time.monotonic() - begin
        after = self.evictions()
        evictions = None if after is None or before is None else after - before
        series = monitor.series
        observed = checks.Observed(
            load=load,
            requested=[r.output_len for group in by_client(requests) for r in group],
            num_opted_out=sum(request.opts_out for request in requests),
            stops=run.stops,
            evictions=evictions,
            series=series,
            blocks_left=blocks_left(self.server),
            log=self.server.log()[self.log_start :],
        )
        result: Run = {
            "evictions": evictions,
            "preemptions": series["preemptions"][-1],
            "peak_running": max(series["running"]),
            "peak_blocks": max(series["blocks"]),
            "pool_blocks": series["pool"][-1],
            "peak_rss_mib": max(series["rss_mib"]),
            "seconds": round(seconds, 1),
            "series": thinned(series, SERIES_POINTS),
        }
        wrong = checks.problems(
            observed, self.policy, self.suite.block_size, self.shard.group_size, run.is_sweep
        )
        if wrong:
            return result | {"status": "wrong", "reason": "; ".join(wrong)}
        cpu_seconds = monitor.cpu_seconds
        return result | {
            "status": "ok",
            "engine_cpu_seconds": round(cpu_seconds, 2),
            "tokens_per_engine_cpu_second": round(load["total_output_tokens"] / cpu_seconds, 2),
            "time_per_token": time_per_token(load),
            "load": {name: value for name, value in load.items() if name not in DETAILS},
        }


@contextmanager
def service(
    suite: Suite,
    workload: Workload,
    policy: Policy,
    model: Path,
    load_arguments: list[str],
    start_timeout: float,
    timeout: float,
) -> Iterator[Service]:
    """Start a policy's server, see that its settings are right, and warm it up.

    Args:
        load_arguments: of :func:`prepare_model`.
        start_timeout: seconds until the server has to be ready.
        timeout: seconds that the warm-up may take.

    Raises:
        RuntimeError: it does not start.
        RunFailedError: its settings are not right, or the warm-up failed.
    """
    shard = Shard(read_model_shape(str(model), suite.dtype)[0])
    arguments = [*load_arguments, *serve_arguments(suite, workload, policy, shard)]
    with running_server(model, arguments, start_timeout) as server:
        settings = settings_in_effect(server)
        if wrong := checks.settings_problems(settings):
            raise RunFailedError("; ".join(wrong))
        if error := ERROR.search(server.log()):
            raise RunFailedError(f"the server logged an error: {error[0]}")
        count = evictions_so_far(server) if policy.budget is None else None
        short = workload.warm_up(policy.budget, policy.window)
        few = draw_requests(short, WARM_UP_SEED)
        run_load(server, few, short.concurrency, model, timeout)
        # A server without eviction logs that it was asked for a count which it does not have.
        start = len(server.log()) if policy.budget is None else 0
        yield Service(
            suite, workload, policy, model, shard, server, arguments, settings, count, start
        )
