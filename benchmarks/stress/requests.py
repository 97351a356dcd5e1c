"""The kinds of requests of the stress test: everything that a client may ask for, and do.

Each request's output is a function of its body alone: it is greedy, seeded or constrained.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    Attributes:
        name: of the kind.
        body: makes one, from random numbers.
        status: of HTTP, that the server has to answer with.
        leaves_after: chunks of the stream after which the client hangs up; 0 stays to the end.
    """

    name: str
    body: Callable[[random.Random], Body]
    status: int = 200
    leaves_after: int = 0


def _prompt(rng: random.Random, low: int, high: int) -> str:
    """So many letters; the model's tokens are bytes."""
    return "".join(rng.choices("abcdefgh ", k=rng.randint(low, high)))


def _completion(low: int, high: int, max_tokens: int, **options: Any) -> Callable[..., Body]:
    """Bodies with prompts of ``low`` to ``high`` tokens and outputs of exactly ``max_tokens``."""

    def body(rng: random.Random) -> Body:
        own = {"prompt": _prompt(rng, low, high), "max_tokens": max_tokens, "temperature": 0}
        if "temperature" in options:
            own["seed"] = rng.randrange(1000)
        if "priority" in options:
            own["priority"] = rng.randrange(4)
        return {"ignore_eos": True} | own | {k: v for k, v in options.items() if k != "priority"}

    return body


def _structured(**constraint: Any) -> Callable[..., Body]:
    def body(rng: random.Random) -> Body:
        own = {"prompt": _prompt(rng, 10, 60), "max_tokens": 300, "temperature": 0}
        return own | {"structured_outputs": constraint}

    return body


KINDS = (
    Kind("short", _completion(5, 40, 20)),
    Kind("longer than the budget", _completion(5, 60, 300)),
    Kind("long prompt", _completion(300, 600, 60)),
    Kind("sampled", _completion(5, 60, 200, temperature=1.0)),
    Kind("three samples", _completion(5, 60, 120, temperature=1.0, n=3)),
    Kind("stop strings", _completion(5, 60, 400, temperature=1.0, stop=["ab", "e"])),
    Kind("log-probabilities", _completion(5, 60, 120, logprobs=3)),
    Kind("priorities", _completion(5, 60, 200, priority=True)),
    Kind("choice", _structured(choice=["an apple " * 9, "a pear " * 12])),
    Kind("regular expression", _structured(regex="[a-f]{150}")),
    Kind("own budget", _completion(5, 60, 200, vllm_xargs={"kv_eviction_budget": 64})),
    Kind("kept prompt", _completion(40, 120, 200, vllm_xargs={"kv_eviction_prompt": "keep"})),
    Kind("no eviction", _completion(5, 60, 200, vllm_xargs={"kv_eviction": "none"})),
    Kind("streamed", _completion(5, 60, 200, stream=True)),
    Kind("client gone", _completion(5, 60, 400, stream=True), leaves_after=20),
    Kind("wrong setting", _completion(5, 9, 5, vllm_xargs={"kv_eviction_budget": -1}), status=400),
    Kind("too long", _completion(4000, 4000, 5), status=400),
)
"""What is drawn from, all alike."""
