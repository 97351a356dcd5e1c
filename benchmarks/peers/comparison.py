"""Runs the systems one after another, each in processes of its own."""

import json
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import psutil
import requests
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common.load import RunFailedError
from benchmarks.common.provenance import provenance
from benchmarks.peers.memory import PeakMemory
from benchmarks.peers.peer import running_peer
from benchmarks.peers.prompts import Prompts, scored_texts, tokenized_texts
from benchmarks.peers.setting import REFERENCE, Setting, System
from benchmarks.peers.vllm_server import running_vllm

CHECKED_PROMPTS = 4
Tokens = list[list[int]]
Run = dict[str, Any]


class Running(Protocol):
    """A system that has loaded its model."""

    versions: dict[str, str]

    def processes(self) -> list[psutil.Process]: ...

    def generate(self, prompts: Tokens, num_tokens: int) -> tuple[Tokens, list[str]]: ...

    def nll(self, texts: Tokens) -> list[list[float]]: ...


def results_file(output: Path, device: str) -> Path:
    """Where the raw results are."""
    return output / f"{device}.json"


class Comparison:
    """All runs of a setting.

    Args:
        systems: those that run; the first is the reference.
        peers: directory of the peers' environments.
        timeout: seconds that a call of vLLM's server may take.
        output: directory of the results.

    Raises:
        EvictionError: there are too few texts for the setting.
    """

    def __init__(
        self,
        setting: Setting,
        systems: Sequence[System],
        peers: Path,
        timeout: float,
        output: Path,
    ) -> None:
        self.setting, self.systems = setting, systems
        self._peers, self._timeout, self._output = peers, timeout, output
        texts = tokenized_texts(setting)
        self._texts = scored_texts(texts, setting)
        prompts = Prompts(texts, setting)
        self._checked = prompts.take(CHECKED_PROMPTS)
        self._warm_up = prompts.take(1)
        self._prompts = {count: prompts.take(count) for count in setting.requests}
        self._expected: Tokens | None = None

    def run(self, rounds: int, notes: Sequence[str]) -> bool:
        """Run all rounds, and write the results after each system.

        Returns:
            Whether every run counts.
        """
        result: dict[str, Any] = {
            **provenance(("vllm", "torch", "transformers", "vase-vllm")),
            "setting": asdict(self.setting) | {"model": self.setting.model.name},
            "notes": list(notes),
            "systems": {},
            "nll": {},
            "runs": [],
        }
        self._output.mkdir(parents=True, exist_ok=True)
        path = results_file(self._output, self.setting.device)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeElapsedColumn(), transient=True) as progress:
            total = rounds * len(self.systems) * len(self.setting.requests)
            task = progress.add_task("", total=total)
            for number in range(1, rounds + 1):
                for system in self.systems if number % 2 else self.systems[::-1]:
                    for run in self._run_system(system, number, result, progress):
                        result["runs"].append(run)
                        progress.console.print(_outcome(run), markup=False, soft_wrap=True)
                        progress.advance(task)
                    path.write_text(json.dumps(result, indent=1) + "\n")
        return all(run["status"] == "ok" for run in result["runs"])

    def _run_system(
        self, system: System, number: int, result: dict[str, Any], progress: Progress
    ) -> list[Run]:
        """All runs of a system in a round, on processes that it starts once."""
        head = {"round": number, "system": system.name}
        task = progress.task_ids[0]
        runs: list[Run] = []

        def show(state: str) -> None:
            progress.update(task, description=f"round {number}, {system.name}: {state}")

        try:
            show("starting")
            with self._start(system) as running:
                result["systems"][system.name] = running.versions
                show("checking its outputs")
                self._check(system, running)
                loaded = PeakMemory(running.processes)
                with loaded:
                    show("warming up")
                    evicting = self.setting.bound + 2 - self.setting.prompt_len
                    running.generate(self._warm_up, evicting)
                for count in self.setting.requests:
                    show(f"{count} requests")
                    run = self._measure(system, running, count)
                    warm = {"warm_rss_mib": round(loaded.rss_mib, 1)}
                    runs.append(head | {"requests": count} | run | warm)
                if self._texts and system.name not in result["nll"]:
                    show("likelihood")
                    result["nll"][system.name] = self._likelihood(running)
        except (RunFailedError, requests.RequestException) as error:
            left = self.setting.requests[len(runs) :]
            failed = {"status": "failed", "reason": str(error)}
            runs += [head | {"requests": count} | failed for count in left]
        return runs

    def _start(self, system: System) -> AbstractContextManager[Running]:
        if system.cache is None:
            log = self._output / "vllm-serve.log"
            return running_vllm(system, self.setting, self._timeout, log)
        return running_peer(system, self.setting, self._peers)

    def _check(self, system: System, running: Running) -> None:
        """Compare first tokens, before any eviction, with those of transformers' full cache.

        Raises:
            RunFailedError: they differ.
        """
        tokens, _ = running.generate(self._checked, self.setting.checked)
        if self._expected is None:
            if system is not REFERENCE:
                raise RunFailedError("transformers' full cache has no outputs to compare with")
            self._expected = tokens
        wrong = sum(a != b for a, b in zip(tokens, self._expected, strict=True))
        if wrong:
            raise RunFailedError(
                f"{wrong} of {len(tokens)} greedy outputs differ from those of transformers' full "
                f"cache in their first {self.setting.checked} tokens"
            )

    def _measure(self, system: System, running: Running, count: int) -> Run:
        """One run; ``status`` is "ok", or "wrong" with the ``reason`` and without a speed."""
        prompts = self._prompts[count][: system.num_run(count, self.setting)]
        with PeakMemory(running.processes) as peak:
            begin = time.monotonic()
            outputs, problems = running.generate(prompts, self.setting.output_len)
            seconds = time.monotonic() - begin
        if any(len(output) != self.setting.output_len for output in outputs):
            problems.append("outputs are not as long as asked for")
        run: Run = {
            "run": len(prompts),
            "seconds": round(seconds, 2),
            "peak_rss_mib": round(peak.rss_mib, 1),
            "peak_device_mib": peak.device_mib,
        }
        if problems:
            return run | {"status": "wrong", "reason": "; ".join(problems)}
        speed = len(prompts) * self.setting.output_len / seconds
        return run | {"status": "ok", "output_tokens_per_second": round(speed, 2)}

    def _likelihood(self, running: Running) -> list[float]:
        """Mean negative log-likelihood of each text, in nats.

        Only tokens count that are computed after the first eviction of the systems that evict last.
        """
        start = self.setting.bound + 1 - self.setting.prompt_len
        return [statistics.fmean(losses[start:]) for losses in running.nll(self._texts)]


def _outcome(run: Run) -> str:
    name = f"round {run['round']}, {run['system']}, {run['requests']} requests"
    if run["status"] != "ok":
        return f"{name}: {run['status']}: {run['reason']}"
    speed, peak = run["output_tokens_per_second"], run["peak_rss_mib"]
    return f"{name}: {speed:.1f} output tokens/s, peak {peak:.0f} MiB"
