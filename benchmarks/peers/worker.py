"""A model in a process of its own, with one library's cache: ``python -m benchmarks.peers.worker``.

The first line of standard input says what to load; every other line is a call of one of the methods
of :class:`~benchmarks.peers.caches.FullCache`. A reply is one line of JSON on standard output.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from benchmarks.peers.caches import CACHES, Bound, FullCache


def load(setting: dict[str, Any]) -> FullCache:
    """Load the model.

    Args:
        setting: ``cache``, ``model``, ``budget``, ``window``, ``threads``, ``dtype``, ``device``.
    """
    torch.set_num_threads(setting["threads"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        setting["model"], dtype=getattr(torch, setting["dtype"])
    ).to(setting["device"])
    # Greedy, and without a token that ends an output.
    model.generation_config = GenerationConfig(pad_token_id=0)
    return CACHES[setting["cache"]](model.eval(), Bound(setting["budget"], setting["window"]))


def groups(cache: FullCache, sequences: list[list[int]]) -> list[torch.Tensor]:
    """The sequences that are computed together: all of them, or one after another."""
    rows = torch.tensor(sequences, device=cache.model.device)
    return [rows] if cache.batches else list(rows.split(1))


def generate(cache: FullCache, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    """Tokens of the outputs, and what each cache held at its end."""
    found = [cache.generate(rows, num_tokens) for rows in groups(cache, prompts)]
    tokens = [row for outputs, _ in found for row in outputs.tolist()]
    return {"tokens": tokens, "held": max(held for _, held in found)}


def nll(cache: FullCache, texts: list[list[int]], prompt_len: int) -> dict[str, Any]:
    """See :meth:`~benchmarks.peers.caches.FullCache.nll`."""
    found = [cache.nll(rows, prompt_len) for rows in groups(cache, texts)]
    return {"nll": torch.cat(found).tolist()}


CALLS = {"generate": generate, "nll": nll}


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr
    logging.disable_progress_bar()
    cache = load(json.loads(sys.stdin.readline()))
    reply: dict[str, Any] = {"versions": cache.versions(), "threads": torch.get_num_threads()}
    print(json.dumps(reply), file=replies, flush=True)
    for line in sys.stdin:
        call, arguments = json.loads(line)
        print(json.dumps(CALLS[call](cache, **arguments)), file=replies, flush=True)


if __name__ == "__main__":
    main()
