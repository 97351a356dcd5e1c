"""A ``vllm serve`` child process: started, watched, measured and stopped.

Whoever starts a server here owns all of its processes. vLLM's API server starts an engine core, and
that its workers; an API server that is stopped while it starts leaves them behind. So the server
gets a session of its own, and the whole process group ends with it: after the ``with`` block, on an
exception, on Ctrl-C, and when this process gets a SIGTERM.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import requests
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from vllm.utils.network_utils import get_open_port

from vase_vllm.tools.termination import sigterm_unwinds

GRACE_SECONDS = 30
"""What a server has to end by itself before it is killed."""


class Server:
    """A server on a free port of this machine; use as a context manager.

    Args:
        model: directory or name of the model.
        arguments: further arguments of ``vllm serve``.
    """

    def __init__(self, model: Path | str, arguments: Sequence[str]) -> None:
        self.url = f"http://127.0.0.1:{(port := get_open_port())}"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        self.command = [*command, "--host", "127.0.0.1", "--port", str(port), *arguments]

    def __enter__(self) -> "Server":
        # The endpoint that asks the workers for their counters is one of vLLM's developer mode.
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vllm-serve-", suffix=".log")
        # A SIGTERM goes through __exit__ from here on.
        self._exits = ExitStack()
        self._exits.enter_context(sigterm_unwinds())
        # A group of its own, to be ended whole, in the same session: Linux (6.18, with autogroups)
        # runs nothing else for seconds while the engine and its worker poll with sched_yield() in
        # a session of their own, neither the API server nor the clients.
        self._process = subprocess.Popen(
            self.command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        )
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.terminate()
            self._process.wait(GRACE_SECONDS)
            psutil.wait_procs(self.processes(), timeout=2)
        except subprocess.TimeoutExpired:
            pass
        finally:
            while left := self.processes():
                for process in left:
                    process.kill()
                self._process.poll()
                psutil.wait_procs(left, timeout=1)
            self._log.close()
            self._exits.close()

    def processes(self) -> list[psutil.Process]:
        """The processes of the server's group that still run."""
        return [p for p in psutil.process_iter() if _is_in_group(p, self._process.pid)]

    def log(self) -> str:
        """What the server has printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def wait_until(self, pattern: str, timeout: float = 180) -> re.Match[str]:
        """Wait until the server prints something.

        Raises:
            RuntimeError: it stopped, or did not print it in time; with the end of its output.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.log()):
                return match
            if self._process.poll() is not None:
                break
            time.sleep(0.2)
        state = f"exit code {self._process.returncode}" if self._process.poll() else "too slow"
        raise RuntimeError(f"vllm serve failed ({state}):\n{self.log()[-4000:]}")

    def wait_until_ready(self) -> None:
        """Wait until the server accepts requests."""
        self.wait_until("Application startup complete")

    def max_concurrency(self) -> tuple[str, float]:
        """vLLM's own start-up line: the line and the number in it."""
        match = self.wait_until(r"Maximum concurrency for .* tokens per request: ([\d.]+)x")
        return match[0], float(match[1])

    def post(self, path: str, body: dict[str, Any]) -> requests.Response:
        """POST a JSON body."""
        return requests.post(self.url + path, json=body, timeout=600)

    def eviction_stats(self) -> dict[str, int]:
        """The first worker's counters: evictions, evicted_tokens, cached_tokens."""
        response = self.post("/collective_rpc", {"method": "get_kv_eviction_stats"})
        response.raise_for_status()
        return response.json()["results"][0]

    def metrics(self) -> dict[str, Metric]:
        """What ``/metrics`` says, by name."""
        text = requests.get(self.url + "/metrics", timeout=30).text
        return {family.name: family for family in text_string_to_metric_families(text)}

    def num_used_blocks(self) -> int:
        """KV cache blocks in use, from vLLM's own metrics."""
        return count_blocks(self.metrics())[0]


def _is_in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def count_blocks(metrics: Mapping[str, Metric]) -> tuple[int, int]:
    """KV cache blocks in use and of the pool; vLLM counts neither with the null block.

    Args:
        metrics: see :meth:`Server.metrics`.
    """
    usage = metrics["vllm:kv_cache_usage_perc"].samples[0].value
    num_blocks = int(metrics["vllm:cache_config_info"].samples[0].labels["num_gpu_blocks"]) - 1
    return round(usage * num_blocks), num_blocks
