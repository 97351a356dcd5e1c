"""Sends requests of all kinds at once, and compares what comes back with what comes back alone."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import requests

from benchmarks.stress.requests import KINDS, Body, Kind
from vase_vllm.tools.server import Server

TIMEOUT = 600
"""Seconds without a word after which a request is taken to hang."""


@dataclass(frozen=True)
class Case:
    """One request that is sent again and again, and what it brings alone (None: not compared)."""

    kind: Kind
    body: Body
    alone: Any


@dataclass
class Outcome:
    """What became of the requests of one kind."""

    sent: int = 0
    wrong_status: int = 0
    different: int = 0
    unanswered: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Requests that did not bring what they had to."""
        return self.wrong_status + self.different + self.unanswered


def make_cases(server: Server, per_kind: int, seed: int) -> list[Case]:
    """Draw requests, and send each alone first."""
    rng = random.Random(seed)
    cases = []
    for kind in KINDS:
        for _ in range(per_kind):
            body = kind.body(rng) | {"model": "stress"}
            compared = kind.status == 200 and not kind.leaves_after
            cases.append(Case(kind, body, send(server, kind, body)[1] if compared else None))
    return cases


def send(server: Server, kind: Kind, body: Body) -> tuple[int, Any, int]:
    """Send a request.

    Returns:
        HTTP status; text and, with log-probabilities, tokens of each sample; output tokens.
    """
    url, stream = server.url + "/v1/completions", body.get("stream", False)
    with requests.post(url, json=body, stream=stream, timeout=TIMEOUT) as response:
        if not stream or response.status_code != 200:
            content = response.json()
            if response.status_code != 200:
                return response.status_code, None, 0
            found = [(choice["text"], _tokens(choice)) for choice in content["choices"]]
            return 200, found, content["usage"]["completion_tokens"]
        chunks = []
        for chunk in _events(response):
            if "error" in chunk:
                # A stream has its status already when its request fails.
                return chunk["error"]["code"], chunk["error"]["message"], len(chunks)
            chunks.append(chunk["choices"][0]["text"])
            if len(chunks) == kind.leaves_after:
                break
        return 200, [("".join(chunks), None)], len(chunks)


def _tokens(choice: dict[str, Any]) -> list[str] | None:
    return None if choice["logprobs"] is None else choice["logprobs"]["tokens"]


def _events(response: requests.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def press(
    server: Server,
    cases: Sequence[Case],
    concurrency: int,
    seed: int,
    goes_on: Callable[[int], bool],
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, Outcome]:
    """Keep so many requests going, drawn from the cases.

    Args:
        goes_on: whether one more is sent, after so many.
        done: called with the number of those that have ended.

    Returns:
        The outcome of each kind.
    """
    rng = random.Random(seed)
    outcomes = {kind.name: Outcome() for kind in KINDS}
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(concurrency) as pool:
        running: set[Future[None]] = set()
        while running or goes_on(counts["sent"]):
            while len(running) < concurrency and goes_on(counts["sent"]):
                case = rng.choice(cases)
                running.add(pool.submit(_judge, server, case, outcomes[case.kind.name]))
                counts["sent"] += 1
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                future.result()
            counts["done"] += len(ended)
            done(counts["done"])
    return outcomes


def _judge(server: Server, case: Case, outcome: Outcome) -> None:
    """Send one request and count what came of it. (Counters may be shared: the GIL is enough.)"""
    start = time.monotonic()
    outcome.sent += 1
    try:
        status, found, num_tokens = send(server, case.kind, case.body)
    except requests.RequestException:
        outcome.unanswered += 1
        return
    outcome.seconds.append(round(time.monotonic() - start, 2))
    outcome.tokens += num_tokens
    if status != case.kind.status:
        outcome.wrong_status += 1
    elif case.alone is not None and found != case.alone:
        outcome.different += 1
