"""A system on transformers, seen from this command: a worker in the peer's environment."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.load import RunFailedError
from benchmarks.common.paths import ROOT
from benchmarks.peers.environment import python_of
from benchmarks.peers.setting import Setting, System
from vase_vllm.tools.termination import sigterm_unwinds

Tokens = list[list[int]]


class Peer:
    """A worker that has loaded its model; :func:`running_peer` starts it.

    Attributes:
        versions: of the libraries that it runs on.
    """

    def __init__(
        self, system: System, setting: Setting, process: "subprocess.Popen[str]", log: Path
    ) -> None:
        self._system, self._setting = system, setting
        self._process, self._log = process, log
        start = asdict(setting) | {"cache": system.cache, "model": str(setting.model)}
        self.versions: dict[str, str] = self._ask(start)["versions"]

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self._process.pid)
        return [own, *own.children(recursive=True)]

    def generate(self, prompts: Tokens, num_tokens: int) -> tuple[Tokens, list[str]]:
        """The outputs, and what is wrong with the cache that they came from.

        Raises:
            RunFailedError: the worker failed, with its last words.
        """
        reply = self._ask(["generate", {"prompts": prompts, "num_tokens": num_tokens}])
        # The last token is never fed back to the model.
        fed = self._setting.prompt_len + num_tokens - 1
        held = reply["held"]
        if not self._system.evicts:
            wrong = held != fed
        else:
            wrong = held > self._setting.bound or (fed > self._setting.bound and held == fed)
        return reply["tokens"], [f"{held} of {fed} tokens were in the cache"] * wrong

    def nll(self, texts: Tokens) -> list[list[float]]:
        """See :meth:`~benchmarks.peers.caches.FullCache.nll`.

        Raises:
            RunFailedError: the worker failed, with its last words.
        """
        arguments = {"texts": texts, "prompt_len": self._setting.prompt_len}
        found: list[list[float]] = self._ask(["nll", arguments])["nll"]
        return found

    def _ask(self, call: Any) -> dict[str, Any]:
        try:
            print(json.dumps(call), file=self._process.stdin, flush=True)
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise RunFailedError(self._log.read_text(errors="replace")[-1500:])
        found: dict[str, Any] = json.loads(reply)
        return found


@contextmanager
def running_peer(system: System, setting: Setting, peers: Path) -> Iterator[Peer]:
    """Start a worker, which ends with the block.

    Args:
        peers: directory of the peers' environments.

    Raises:
        RunFailedError: it does not start.
    """
    python = Path(sys.executable)
    if system.environment is not None:
        python = python_of(peers, system.environment)
    with sigterm_unwinds(), tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield Peer(system, setting, process, Path(log.name))
        finally:
            process.kill()
            process.communicate()
