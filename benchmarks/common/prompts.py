"""The requests of a workload, as a file for ``vllm bench serve``.

vLLM's ``random`` dataset runs through the vocabulary from a drawn start. With a vocabulary of bytes
there are so few starts that most prompts come more than once, and the full cache's prefix caching
answers what nobody meant to repeat. Here prompts are independent characters, a token each.
"""

import json
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.serving.suites import Workload

ALPHABET = np.array(list(string.ascii_letters + string.digits))
WARM_UP_SEED, SEED = 0, 1


@dataclass(frozen=True)
class Request:
    """A prompt of characters that are a token each, and the tokens of its answer."""

    prompt: str
    output_len: int


def draw_requests(workload: Workload, seed: int) -> list[Request]:
    """The workload's requests; other seeds share no prompt, and no prefix, with these."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> str:
        return "".join(rng.choice(ALPHABET, length))

    prefix = text(workload.prefix_len)
    least, most = (round(workload.output_len * (1 + s * workload.spread)) for s in (-1, 1))
    lengths = rng.integers(least, most, size=workload.num_requests, endpoint=True)
    return [Request(prefix + text(workload.input_len), int(length)) for length in lengths]


def write_dataset(requests: list[Request], path: Path) -> None:
    """A file for ``--dataset-name custom``, in the order of the requests."""
    lines = [
        json.dumps({"prompt": request.prompt, "output_tokens": request.output_len})
        for request in requests
    ]
    path.write_text("\n".join(lines) + "\n")
