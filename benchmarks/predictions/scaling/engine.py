"""An in-process engine in a process of its own, that times decode steps on request."""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.common.environment import IN_PROCESS, QUIET

ENVIRONMENT = {**QUIET, **IN_PROCESS, "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Cell:
    """Decode steps to time: ``batch`` sequences with ``prompt`` tokens before them.

    Attributes:
        warm: decode steps before the timed ones.
        steps: timed decode steps.
    """

    batch: int
    prompt: int
    warm: int
    steps: int


class Engine:
    """The other end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def measure(self, cell: Cell) -> dict[str, list[float]]:
        """Seconds of each timed step: of the processor (``cpu``) and of the clock (``wall``)."""
        self.connection.send(cell)
        return self.connection.recv()

    def measure_peak(self) -> float:
        """Operations per second of an fp32 matrix product of the size that scores one KV head."""
        self.connection.send(None)
        return self.connection.recv()


@contextmanager
def engine(arguments: dict[str, Any]) -> Iterator[Engine]:
    """Start an engine; ready when its first cell is measured."""
    os.environ.update(ENVIRONMENT)
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Engine(ours)
    finally:
        ours.close()
        process.join(timeout=20)
        process.kill()


def _serve(connection: Connection, arguments: dict[str, Any]) -> None:
    from vllm import LLM

    llm = LLM(**arguments)
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        connection.send(_measure_peak() if cell is None else _measure(llm, cell))


def _measure_peak(rows: int = 128, columns: int = 1024, depth: int = 64) -> float:
    """A window's queries of one KV head (64 of 2 heads) times the keys of 1024 candidates."""
    import torch

    left, right = torch.randn(rows, depth), torch.randn(depth, columns)
    rates = []
    for _ in range(15):
        start = time.process_time()
        for _ in range(50):
            left @ right
        rates.append(50 * 2 * rows * columns * depth / (time.process_time() - start))
    return statistics.median(rates)


def _measure(llm: Any, cell: Cell) -> dict[str, list[float]]:
    from vllm import SamplingParams, TokensPrompt

    engine = llm.llm_engine
    # One step more than is needed, so that no sequence ends while it is timed.
    tokens = cell.warm + cell.steps + 2 * cell.batch + cell.prompt // 64 + 8
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    names = [f"{time.monotonic_ns()}-{index}" for index in range(cell.batch)]
    for index, name in enumerate(names):
        prompt = TokensPrompt(prompt_token_ids=_prompt(index, cell.prompt))
        engine.add_request(name, prompt, params)
    lengths = dict.fromkeys(names, 0)

    def step() -> None:
        for output in engine.step():
            lengths[output.request_id] = len(output.outputs[0].token_ids)

    while min(lengths.values()) < cell.warm:
        step()
    cpu, wall = [], []
    for _ in range(cell.steps):
        start_cpu, start_wall = time.process_time(), time.perf_counter()
        step()
        cpu.append(time.process_time() - start_cpu)
        wall.append(time.perf_counter() - start_wall)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        step()
    return {"cpu": cpu, "wall": wall}


def _prompt(seed: int, length: int) -> list[int]:
    """Pseudorandom bytes; a shorter prompt is the start of a longer one, so that it is cached."""
    import random

    source = random.Random(seed)
    return [source.randrange(32, 127) for _ in range(length)]
