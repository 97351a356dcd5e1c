"""One load, the same for all policies: how many requests of which lengths, how many at a time."""

import json
import string
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ALPHABET = np.array(list(string.ascii_letters + string.digits))
WARM_UP_SEED, SEED = 0, 1


@dataclass(frozen=True)
class Workload:
    """One load. Lengths are in tokens.

    Attributes:
        question: what it is there to show.
        max_model_len: longest sequence that the servers accept.
        num_requests: all in all; in a sweep, at its first concurrency.
        concurrency: requests at a time; in a sweep, the first.
        output_len: mean length of the outputs, which never end by themselves but for ``stops``.
        kv_tokens: tokens that the KV cache memory of every policy holds; None is all the memory
            that vLLM gives it.
        max_concurrency: where it is given, the workload is a sweep: the concurrency doubles up to
            it (see ``benchmarks/serving/sweep.py``).
        input_spread: prompts are drawn uniformly from input_len * (1 - input_spread) to
            * (1 + input_spread), so that evictions spread over the steps.
        spread: the same of the outputs.
        stops: token ids that end an output. Tokens are then sampled, and nobody knows beforehand
            how long an output will be; ``output_len`` is the longest.
        prefix_len: length of a prefix that all prompts share, beside their input_len.
        mixture: workloads whose requests it has, all of them in a drawn order. It has as many as
            they have together, and its own lengths are means.
        opts_out: whether its requests ask for the full cache, whatever the server's policy is.
        rounds: times that every policy runs, in turn.
        policies: names of those of the suite that it runs unless told otherwise; none is all.
    """

    name: str
    question: str
    max_model_len: int
    num_requests: int
    concurrency: int
    input_len: int
    output_len: int
    kv_tokens: int | None = None
    max_concurrency: int | None = None
    input_spread: float = 0.0
    spread: float = 0.0
    stops: tuple[int, ...] = ()
    prefix_len: int = 0
    mixture: tuple["Workload", ...] = ()
    opts_out: bool = False
    rounds: int = 3
    policies: tuple[str, ...] = ()

    @property
    def is_sweep(self) -> bool:
        return self.max_concurrency is not None

    def at(self, concurrency: int) -> "Workload":
        """The run of a sweep at a concurrency: as many requests for each client as at the first."""
        num_requests = self.num_requests * concurrency // self.concurrency
        return replace(self, concurrency=concurrency, num_requests=num_requests)

    def warm_up(self, budget: int | None, window: int) -> "Workload":
        """The run that is thrown away: it is short, and prompts that fill the budget evict.

        As many requests as are at a time in the workload, or as fit into memory at once.
        """
        output_len = 2 * window + 2
        input_len = min(budget or self.input_len, self.max_model_len - output_len)
        concurrency = min(self.concurrency, self.num_requests)
        if self.kv_tokens is not None:
            concurrency = max(1, min(concurrency, self.kv_tokens // (input_len + output_len)))
        return replace(
            self,
            num_requests=concurrency,
            concurrency=concurrency,
            input_len=input_len,
            output_len=output_len,
            prefix_len=0,
            input_spread=0.0,
            spread=0.0,
            stops=(),
            mixture=(),
        )


@dataclass(frozen=True)
class Request:
    """A prompt of characters that are a token each, and the tokens of its output.

    Attributes:
        opts_out: whether it asks for the full cache, whatever the server's policy is.
    """

    prompt: str
    output_len: int
    opts_out: bool = False


def draw_requests(workload: Workload, seed: int) -> list[Request]:
    """The workload's requests; other seeds share no prompt, and no prefix, with these.

    vLLM's ``random`` data set runs through the vocabulary from a drawn start. With a vocabulary of
    bytes there are so few starts that most prompts come more than once, and prefix caching answers
    what nobody meant to repeat. Here prompts are independent characters, a token each.
    """
    rng = np.random.default_rng(seed)
    if workload.mixture:
        parts = [
            draw_requests(part, (seed << 8) + 1 + index)
            for index, part in enumerate(workload.mixture)
        ]
        requests = [request for part in parts for request in part]
        return [requests[index] for index in rng.permutation(len(requests))]

    def text(length: int) -> str:
        return "".join(rng.choice(ALPHABET, length))

    def lengths(mean: int, spread: float) -> list[int]:
        least, most = (round(mean * (1 + sign * spread)) for sign in (-1, 1))
        drawn = rng.integers(least, most, size=workload.num_requests, endpoint=True)
        return [int(length) for length in drawn]

    prefix = text(workload.prefix_len)
    outputs = lengths(workload.output_len, workload.spread)
    inputs = [workload.input_len] * workload.num_requests
    if workload.input_spread:
        inputs = lengths(workload.input_len, workload.input_spread)
    return [
        Request(prefix + text(input_len), output_len, workload.opts_out)
        for input_len, output_len in zip(inputs, outputs, strict=True)
    ]


def write_dataset(requests: list[Request], path: Path) -> None:
    """A file for ``--dataset-name custom``, in the order of the requests."""
    lines = [
        json.dumps({"prompt": request.prompt, "output_tokens": request.output_len})
        for request in requests
    ]
    path.write_text("\n".join(lines) + "\n")
