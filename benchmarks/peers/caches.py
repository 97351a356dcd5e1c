"""How each library holds the KV cache of a transformers model; runs in that library's environment.

It imports nothing but torch, transformers and, when asked for it, one of the peers.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Bound:
    """The cache that every library is given, in tokens for each layer and KV head.

    Attributes:
        budget: tokens right after an eviction.
        window: tokens between two evictions.
    """

    budget: int
    window: int


class FullCache:
    """transformers as it comes. The others differ in the cache, or in hooks around the model.

    Attributes:
        packages: whose versions belong to a result.
        batches: whether requests can be computed together.
    """

    packages: tuple[str, ...] = ("transformers", "torch")
    batches = True

    def __init__(self, model: PreTrainedModel, bound: Bound) -> None:
        self.model, self.bound = model, bound

    def cache(self, prompt_len: int) -> Cache:
        """A new cache, for prompts of this length."""
        return DynamicCache()

    def active(self) -> AbstractContextManager[None]:
        """What has to surround a sequence from its prompt to its last token."""
        return nullcontext()

    def versions(self) -> dict[str, str]:
        return {package: version(package) for package in self.packages}

    @torch.inference_mode()
    def generate(self, prompts: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, int]:
        """Greedy outputs; an end-of-text token does not end them.

        Args:
            prompts: int64 [requests, prompt length].

        Returns:
            The outputs, int64 [requests, num_tokens], and the tokens that the cache holds at the
            end.
        """
        cache = self.cache(prompts.shape[1])
        with self.active():
            sequences = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                past_key_values=cache,
                max_new_tokens=num_tokens,
            )
        return sequences[:, prompts.shape[1] :], held(cache)

    @torch.inference_mode()
    def nll(self, texts: torch.Tensor, prompt_len: int) -> torch.Tensor:
        """Teacher forcing: the first tokens are a prompt, the others are fed one by one.

        Args:
            texts: int64 [texts, length].

        Returns:
            Negative log-likelihood in nats of the tokens from ``prompt_len`` on, float32
            [texts, length - prompt_len].
        """
        cache = self.cache(prompt_len)
        losses = []
        with self.active():
            for start, end in steps(prompt_len, texts.shape[1]):
                logits = self.model(
                    input_ids=texts[:, start:end],
                    past_key_values=cache,
                    # A peer whose cache is short does not know how many tokens there have been.
                    position_ids=torch.arange(start, end, device=texts.device)[None],
                    logits_to_keep=1,
                ).logits
                losses.append(
                    F.cross_entropy(logits[:, -1].float(), texts[:, end], reduction="none")
                )
        return torch.stack(losses, dim=1)


class KvpressRandom(FullCache):
    """kvpress's decoding press, which keeps what its ``RandomPress`` draws."""

    packages = ("kvpress", "transformers", "torch")

    @contextmanager
    def active(self) -> Iterator[None]:
        from kvpress import DecodingPress

        press, num_queries = self.press()
        decoding = DecodingPress(
            base_press=press,
            compression_interval=self.bound.window,
            target_size=self.bound.budget,
            hidden_states_buffer_size=num_queries,
        )
        with decoding(self.model):
            yield

    def press(self) -> tuple[object, int]:
        """The press that scores tokens, and how many hidden states it needs."""
        from kvpress import RandomPress

        return RandomPress(), 0


class KvpressSnapkv(KvpressRandom):
    """kvpress's decoding press, which keeps what its ``SnapKVPress`` scores highest."""

    def press(self) -> tuple[object, int]:
        from kvpress import SnapKVPress

        # It wants more hidden states than it takes queries from, and there is one for each token
        # since the last eviction.
        return SnapKVPress(window_size=self.bound.window - 1), self.bound.window


class Randkv(FullCache):
    """randkv's cache, which keeps the prompt and draws from the output; one request at a time."""

    packages = ("randkv", "transformers", "torch")
    batches = False

    def cache(self, prompt_len: int) -> Cache:
        from randkv import RandKVConfig
        from randkv.transformers import RandKVCache

        # Right after an eviction it holds its budget and, beside it, its buffer.
        config = RandKVConfig(
            budget=self.bound.budget - self.bound.window, buffer_size=self.bound.window
        )
        return RandKVCache(
            model_config=self.model.config, prompt_length=prompt_len, randkv_config=config
        )


CACHES = {
    "transformers": FullCache,
    "kvpress-random": KvpressRandom,
    "kvpress-snapkv": KvpressSnapkv,
    "randkv": Randkv,
}


def held(cache: Cache) -> int:
    """Tokens of the cache's first layer."""
    return cache.layers[0].keys.shape[-2]


def steps(prompt_len: int, length: int) -> Iterator[tuple[int, int]]:
    """First and last position + 1 of each forward pass; the last token is only predicted."""
    yield 0, prompt_len
    for position in range(prompt_len, length - 1):
        yield position, position + 1
