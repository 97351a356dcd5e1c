"""What a request's block-table row begins with."""

import zlib
from typing import NamedTuple

import numpy as np
from vllm.v1.request import Request

from vase_vllm.config import EvictionConfig
from vase_vllm.layout.block_table_row import NEVER
from vase_vllm.request_settings import SAMPLE, settings_of_request


class SequenceNumbers(NamedTuple):
    """The part of a row's header that the schedule goes by; see ``RowHeader``."""

    first: int
    budget: int
    kept: int


def sequence_numbers(server: EvictionConfig, request: Request, longest: int) -> SequenceNumbers:
    """Those of a request: a function of it alone, also after a preemption.

    A request that opts out of eviction, or that ends before it could evict, keeps all of its
    prompt, and never evicts. While a request waits this is asked for in every step, and the key,
    which reads the whole prompt, is not.

    Args:
        longest: tokens that it can come to have, prompt and output.
    """
    sampling = request.sampling_params
    own = settings_of_request(server, sampling.extra_args if sampling is not None else None)
    num_prompt = request.num_prompt_tokens
    if own is None or not own.schedule.comes_to_evict(num_prompt, longest):
        return SequenceNumbers(NEVER, server.budget + num_prompt, kept=num_prompt)
    kept = num_prompt if own.prompt == "keep" else 0
    return SequenceNumbers(own.schedule.first_eviction(num_prompt), own.budget + kept, kept)


def content_key(request: Request) -> int:
    """31-bit hash of what a request asks for: its prompt, its sampling seed, and which sample.

    Draws keyed by it repeat when the same request comes again, alone or in any batch.
    """
    sampling = request.sampling_params
    seed = sampling.seed if sampling is not None and sampling.seed is not None else 0
    tokens = np.asarray(request.prompt_token_ids or (), dtype=np.int32)
    key = zlib.crc32(tokens.tobytes(), seed & 0xFFFFFFFF)
    extra_args = (sampling.extra_args if sampling is not None else None) or {}
    if SAMPLE in extra_args:
        key = zlib.crc32(str(extra_args[SAMPLE]).encode(), key)
    return key & 0x7FFFFFFF
