"""Watches a server while it is under load: its metrics and its processes."""

import threading
import time
from types import TracebackType

import psutil
import requests

from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.tools.server import Server, count_blocks

METRICS = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "preemptions": "vllm:num_preemptions",
    "generated": "vllm:generation_tokens",
}


def engine_processes(server: Server) -> list[psutil.Process]:
    """The engine core and its workers: what the API server has started."""
    own = [p for p in psutil.Process().children() if p.cmdline() == server.command]
    return [child for process in own for child in process.children(recursive=True)]


def resources(processes: list[psutil.Process]) -> dict[str, float]:
    """Resident memory and processor time, summed over the processes that still run."""
    memory = seconds = 0.0
    for process in processes:
        try:
            memory += process.memory_info().rss
            times = process.cpu_times()
            seconds += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return {"rss_mib": memory / 2**20, "cpu_seconds": seconds}


def read_metrics(server: Server) -> dict[str, float]:
    """The numbers of :data:`METRICS`, and the KV cache blocks in use, of one moment."""
    families = server.metrics()
    result = {name: families[metric].samples[0].value for name, metric in METRICS.items()}
    result["blocks"], result["pool"] = count_blocks(families)
    return result


class Monitor:
    """Samples a server in a thread; use as a context manager.

    Attributes:
        series: name to a list with a value for each sample; ``seconds`` counts from the start.
        cpu_seconds: processor time of the engine processes meanwhile.
    """

    def __init__(self, server: Server, interval: float) -> None:
        self.series: dict[str, list[float]] = {}
        self.cpu_seconds = 0.0
        self._server = server
        self._interval = interval
        self._processes = engine_processes(server)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Monitor":
        self._before = read_metrics(self._server)
        self._cpu_before = resources(self._processes)["cpu_seconds"]
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        self.cpu_seconds = resources(self._processes)["cpu_seconds"] - self._cpu_before

    def latest(self, name: str) -> float:
        """The newest sample, 0 before the first."""
        return self.series[name][-1] if name in self.series else 0.0

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        try:
            sample = read_metrics(self._server)
        except requests.RequestException:
            return  # a server that died is found out by the load, with its log
        for name in ("preemptions", "generated"):
            sample[name] -= self._before[name]
        sample["seconds"] = round(time.monotonic() - self._start, 2)
        sample["rss_mib"] = round(resources(self._processes)["rss_mib"], 1)
        for name, value in sample.items():
            self.series.setdefault(name, []).append(value)


def thinned(series: dict[str, list[float]], points: int) -> dict[str, list[float]]:
    """Every n-th sample, so that about ``points`` are left."""
    length = len(next(iter(series.values()), []))
    step = max(1, cdiv(length, points))
    return {name: values[::step] for name, values in series.items()}
