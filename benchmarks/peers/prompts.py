"""Prompts and texts: tokens of the texts that come with Python, in the model's own vocabulary."""

from collections.abc import Iterator

from transformers import AutoTokenizer

from benchmarks.peers.setting import Setting
from vase_vllm.errors import EvictionError
from vase_vllm.tools.evaluation.texts import own_texts

Tokens = list[list[int]]


def tokenized_texts(setting: Setting) -> Tokens:
    """The tokens of each text."""
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    # It would warn that a whole text is longer than the model takes.
    options = {"add_special_tokens": False, "verbose": False}
    return [tokenizer.encode(text.content, **options) for text in own_texts()]


class Prompts:
    """Gives every run prompts that no server has seen, or its prefix cache would know them.

    Args:
        texts: see :func:`tokenized_texts`.
    """

    def __init__(self, texts: Tokens, setting: Setting) -> None:
        self._pieces = _pieces(texts, setting.prompt_len)

    def take(self, count: int) -> Tokens:
        """The next prompts.

        Raises:
            EvictionError: the texts are too short for so many.
        """
        found = [prompt for _, prompt in zip(range(count), self._pieces, strict=False)]
        if len(found) < count:
            raise EvictionError("--requests: the texts have no more prompts; ask for fewer")
        return found


def _pieces(texts: Tokens, length: int) -> Iterator[list[int]]:
    """Pieces of this length from every text in turn, none of which overlap."""
    for start in range(0, max(map(len, texts)), length):
        for text in texts:
            if len(piece := text[start : start + length]) == length:
                yield piece


def scored_texts(texts: Tokens, setting: Setting) -> Tokens:
    """The beginnings of as many texts as are scored, each as long as a sequence.

    Raises:
        EvictionError: there are not so many texts of this length.
    """
    found = [text[: setting.length] for text in texts if len(text) >= setting.length]
    if len(found) < setting.texts:
        raise EvictionError(
            f"--texts {setting.texts}: only {len(found)} texts have {setting.length} tokens; "
            "ask for fewer, or lower --output-len"
        )
    return found[: setting.texts]
