"""What a request's block-table row begins with."""

import zlib

import numpy as np
from vllm.v1.request import Request

from vase_vllm.config import EvictionConfig
from vase_vllm.layout.block_table_row import NEVER, RowHeader
from vase_vllm.request_settings import SAMPLE, settings_of_request


def make_header(server: EvictionConfig, request: Request) -> RowHeader:
    """The header of a request's row: a function of the request alone, also after a preemption.

    A request that opts out of eviction keeps all of its prompt, and never evicts.
    """
    sampling = request.sampling_params
    own = settings_of_request(server, sampling.extra_args if sampling is not None else None)
    num_prompt, key = request.num_prompt_tokens, content_key(request)
    if own is None:
        return RowHeader(NEVER, key, server.budget + num_prompt, kept=num_prompt)
    kept = num_prompt if own.prompt == "keep" else 0
    return RowHeader(own.schedule.first_eviction(num_prompt), key, own.budget + kept, kept)


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
