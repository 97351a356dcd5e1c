"""Token sequences that an engine scores."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vase_vllm.errors import EvictionError
from vase_vllm.tools.evaluation.texts import Half, Text


@dataclass(frozen=True)
class Sample:
    """A sequence, the same for every method.

    Attributes:
        name: what the tables and files call it; no other sample has it.
        half: which half of the texts it belongs to.
        token_ids: the sequence.
        top_logprobs: how many of the most probable tokens are wanted at each position.
    """

    name: str
    half: Half
    token_ids: tuple[int, ...]
    top_logprobs: int

    @property
    def sha256(self) -> str:
        """Of the token ids, in hexadecimal."""
        return hashlib.sha256(np.array(self.token_ids, dtype=np.int64).tobytes()).hexdigest()


def text_samples(
    texts: Sequence[Text], tokenizer: Any, max_tokens: int, least: int, top_logprobs: int
) -> list[Sample]:
    """The first tokens of each text.

    Args:
        tokenizer: of Hugging Face.
        max_tokens: most tokens of each text.
        least: tokens that a text must exceed for anything to be evicted.

    Raises:
        EvictionError: a text is too short.
    """
    samples = []
    for text in texts:
        # A tokenizer warns of more tokens than its model's context.
        token_ids = tokenizer(text.content, verbose=False)["input_ids"][:max_tokens]
        if len(token_ids) <= least + 1:
            raise EvictionError(
                f"{text.name} has {len(token_ids)} tokens, and nothing is scored under eviction "
                f"before {least + 2}: give a longer text, raise --max-tokens or lower --budgets"
            )
        samples.append(Sample(text.name, text.half, tuple(token_ids), top_logprobs))
    return samples
