"""One run of lm-evaluation-harness against a server: a task, once, with one seed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reasoning.suite import TASKS, TASKS_DIRECTORY

DAY = 24 * 3600


class RunFailedError(RuntimeError):
    """lm-evaluation-harness stopped without a result; the message says where its output is."""


@dataclass(frozen=True)
class Request:
    """What is asked of the model, beside the problems.

    Attributes:
        model: the name that the server knows it by.
        sampling: sent with every request: temperature, top_p and so on.
        max_tokens: longest answer.
        limit: the first so many problems only.
        concurrency: requests at a time.
        include_path: directory of tasks that are not ours.
    """

    model: str
    sampling: dict[str, float]
    max_tokens: int
    limit: int | None
    concurrency: int
    include_path: Path | None


@dataclass(frozen=True)
class Answer:
    """One answer: its problem's number, its marks and its text."""

    problem: int
    exact_match: float
    no_answer: float | None
    text: str


def command(request: Request, task: str, seed: int, base_url: str, directory: Path) -> list[str]:
    """The ``lm_eval`` command line.

    The seed goes with every request. A second sample of a problem needs another one: lm-eval sends
    the same seed with all repeats, and a server that honours it gives the same answer.
    """
    model_arguments = {
        "model": request.model,
        "base_url": f"{base_url}/v1/chat/completions",
        "num_concurrent": request.concurrency,
        "seed": seed,
        "timeout": DAY,  # of one answer; lm-eval's default of 300 s is too short for 32k tokens
    }
    generation = request.sampling | {"max_gen_toks": request.max_tokens}
    include_path = TASKS_DIRECTORY if task in TASKS else request.include_path
    arguments = [
        *[sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions"],
        *["--model_args", json.dumps(model_arguments), "--apply_chat_template"],
        *["--tasks", f"vase_{task}" if task in TASKS else task],
        *["--gen_kwargs", json.dumps(generation)],
        *["--log_samples", "--output_path", str(directory / "lm_eval")],
        *["--use_cache", str(cache(directory))],
    ]
    if include_path is not None:
        arguments += ["--include_path", str(include_path)]
    if request.limit is not None:
        arguments += ["--limit", str(request.limit)]
    return arguments


def cache(directory: Path) -> Path:
    """Where lm-eval keeps the answers that it has, to go on from after an interruption."""
    return directory / "answers"


def evaluate(
    arguments: list[str], directory: Path, progress: Callable[[int, int], None]
) -> list[Answer]:
    """Run lm-eval's command; its output goes to ``directory``.

    Args:
        progress: called with the answers that are there and the answers to come, all in all.

    Raises:
        RunFailedError: it failed, or its samples cannot be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    output, log = directory / "lm_eval", directory / "lm_eval.log"
    shutil.rmtree(output, ignore_errors=True)
    with log.open("w") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                if counts := answered(log.read_text(errors="replace")):
                    progress(*counts)
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise RunFailedError(f"lm_eval failed (see {log}): {lines[-1]}")
    return read_answers(output)


def answered(log: str) -> tuple[int, int] | None:
    """The newest count in lm-eval's own progress bar."""
    counts = re.findall(r"Requesting API:.*?(\d+)/(\d+)", log)
    return (int(counts[-1][0]), int(counts[-1][1])) if counts else None


def read_answers(output: Path) -> list[Answer]:
    """The samples that lm-eval has logged.

    Raises:
        RunFailedError: there is not one mark for each problem.
    """
    lines = [line for path in output.rglob("samples_*.jsonl") for line in path.open()]
    samples: list[dict[str, Any]] = [json.loads(line) for line in lines]
    if not samples or any("exact_match" not in sample for sample in samples):
        raise RunFailedError(f"{output}: only tasks that are marked by exact_match can be run")
    if len({sample["doc_id"] for sample in samples}) != len(samples):
        raise RunFailedError(f"{output}: only tasks that mark an answer in one way can be run")
    return [
        Answer(
            problem=sample["doc_id"],
            exact_match=float(sample["exact_match"]),
            no_answer=sample.get("no_answer"),
            text=sample["resps"][0][0],
        )
        for sample in samples
    ]
