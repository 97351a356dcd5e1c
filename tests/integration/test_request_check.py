"""Which requests are rejected before they are scheduled, and with which words."""

from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams

from vase_vllm.integration.request_check import reason_to_reject

EVICTION = {"kv_eviction": {"policy": "vase", "budget": 96, "window": 16}}


def engine_config(num_blocks, additional_config=EVICTION, sliding_window=None, **parallel):
    one_engine = {
        "data_parallel_size": 1,
        "data_parallel_size_local": 1,
        "local_engines_only": False,
    }
    return SimpleNamespace(
        additional_config=additional_config,
        cache_config=SimpleNamespace(num_gpu_blocks=num_blocks, block_size=32),
        parallel_config=SimpleNamespace(**one_engine | parallel),
        model_config=SimpleNamespace(
            max_model_len=2048,
            get_num_attention_heads=lambda _: 4,
            get_num_kv_heads=lambda _: 2,
            get_head_size=lambda: 64,
            dtype=torch.float32,
            get_sliding_window=lambda: sliding_window,
        ),
    )


def request(prompt_len, resumable=False, max_tokens=None, **xargs):
    return SimpleNamespace(
        prompt_token_ids=[2] * prompt_len,
        prompt_embeds=None,
        resumable=resumable,
        sampling_params=SamplingParams(extra_args=xargs or None, max_tokens=max_tokens),
    )


@pytest.mark.parametrize(
    ("prompt_len", "num_required"),
    # A prompt of 200 evicts first at 208; 7 blocks hold that, and one its queries.
    [(200, 8), (1, 5)],
)
def test_a_prompt_that_can_never_fit(prompt_len, num_required):
    # Block 0 of the pool is the null block.
    assert reason_to_reject(engine_config(num_required + 1), request(prompt_len)) is None
    reason = reason_to_reject(engine_config(num_required), request(prompt_len))
    assert reason.startswith(f"The prompt ({prompt_len} tokens) needs {num_required} KV cache")
    assert "\n" not in reason


def test_a_request_that_cannot_come_to_evict_keeps_no_queries():
    """A prompt of 200 evicts first at 208: not with 209 tokens, the last of which is not read."""
    config = engine_config(7 + 1)
    assert reason_to_reject(config, request(200, max_tokens=9)) is None
    assert "needs 8 KV cache blocks" in reason_to_reject(config, request(200, max_tokens=10))


def test_no_opting_out_where_nobody_knows_whether_it_fits():
    bounded = {"kv_eviction": {**EVICTION["kv_eviction"], "prefill": "bounded"}}
    opts_out = request(30, kv_eviction="none")
    for additional, sliding_window in ((EVICTION, 64), (bounded, None)):
        config = engine_config(500, additional, sliding_window)
        assert reason_to_reject(config, opts_out) is None
    config = engine_config(500, bounded, sliding_window=64)
    assert reason_to_reject(config, request(30)) is None
    reason = reason_to_reject(config, opts_out)
    assert reason.startswith("vllm_xargs.kv_eviction: a request cannot opt out")
    assert "prefill bounded" in reason


@pytest.mark.parametrize(
    ("local_engines_only", "num_engines"), [(False, 8), (True, 2)], ids=["internal", "hybrid"]
)
def test_the_pool_of_an_engine_under_data_parallelism(local_engines_only, num_engines):
    """Behind an external or hybrid load balancer an API server sees its own engines' blocks."""
    parallel = {
        "data_parallel_size": 8,
        "data_parallel_size_local": 2,
        "local_engines_only": local_engines_only,
    }
    fits = engine_config(9 * num_engines, **parallel)
    assert reason_to_reject(fits, request(200)) is None
    assert reason_to_reject(engine_config(8 * num_engines, **parallel), request(200))


def test_the_pool_may_not_be_known_yet():
    assert reason_to_reject(engine_config(None), request(2000)) is None


def test_a_streaming_input_session():
    reason = reason_to_reject(engine_config(100), request(5, resumable=True))
    assert reason.startswith("Streaming-input sessions are not supported with --kv-eviction: send")
    assert "\n" not in reason


@pytest.mark.parametrize("key", ["kv_evict", "eviction", "kv_eviction_window"])
def test_an_unknown_setting_of_a_request(key):
    reason = reason_to_reject(engine_config(100), request(5, **{key: "none"}))
    assert reason == (
        f"vllm_xargs.{key}: unknown key; the keys are kv_eviction, kv_eviction_budget, "
        "kv_eviction_prompt, kv_eviction_report."
    )


def test_a_request_that_opts_out_must_fit_with_its_output():
    """Prompt and output of 320 tokens fill 10 blocks, and there is no query to keep."""
    out = {"kv_eviction": "none"}
    assert reason_to_reject(engine_config(11), request(200, max_tokens=120, **out)) is None
    reason = reason_to_reject(engine_config(10), request(200, max_tokens=120, **out))
    assert reason == (
        "The request (320 tokens with its output) needs 10 KV cache blocks without eviction, and "
        "the pool has 9: lower max_tokens or remove vllm_xargs.kv_eviction."
    )
    # Without a limit the output may fill the model's context, here 64 blocks.
    assert reason_to_reject(engine_config(64), request(200, **out))
    assert reason_to_reject(engine_config(65), request(200, **out)) is None


def test_a_kept_prompt_must_fit_beside_the_budget():
    """200 tokens, budget and window are 10 blocks, and one holds the queries."""
    keep = {"kv_eviction_prompt": "keep"}
    assert reason_to_reject(engine_config(12), request(200, **keep)) is None
    reason = reason_to_reject(engine_config(11), request(200, **keep))
    assert "needs 11 KV cache blocks until its first eviction, and the pool has 10" in reason
    assert "set vllm_xargs.kv_eviction_prompt evict" in reason
    # What is too short to evict needs neither.
    assert reason_to_reject(engine_config(8), request(200, max_tokens=20, **keep)) is None


def test_what_is_no_setting_of_eviction_is_let_through():
    others = {"kv_transfer_params": {}, "my_logits_processor": 3}
    assert reason_to_reject(engine_config(100), request(5, **others)) is None
    pooling = SimpleNamespace(
        prompt_token_ids=[2], prompt_embeds=None, resumable=False, sampling_params=None
    )
    assert reason_to_reject(engine_config(100), pooling) is None


@pytest.mark.parametrize("resumable", [False, True])
def test_without_eviction_nothing_is_rejected(resumable):
    assert reason_to_reject(engine_config(2, {}), request(2000, resumable)) is None
