"""What eviction does not work with is refused when the engine's config is made, in one line."""

import json

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vase_vllm.errors import EvictionError
from vase_vllm.integration import patches

EVICTION = {"policy": "vase", "budget": 128, "window": 16}


def make_config(model, eviction=EVICTION, **options):
    settings = {"max_model_len": 2048, "skip_tokenizer_init": True, "block_size": 32}
    args = EngineArgs(
        model=str(model), additional_config={"kv_eviction": eviction}, **(settings | options)
    )
    return args.create_engine_config()


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"kv_cache_dtype": "fp8"}, "set --kv-cache-dtype auto"),
        ({"kv_cache_dtype": "bfloat16", "dtype": "float32"}, "set --kv-cache-dtype auto"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "remove --speculative-config",
        ),
        ({"kv_offloading_size": 1.0}, "remove --kv-offloading-size"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "remove --kv-transfer-config",
        ),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "remove --scheduler-cls"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "remove --worker-cls"),
        ({"max_model_len": 144}, "raise --max-model-len"),
        ({"runner": "pooling"}, "remove --kv-eviction"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_features(models, options, remedy):
    with pytest.raises(EvictionError) as error:
        make_config(models.qwen3(), **options)
    message = str(error.value)
    assert message.startswith("--kv-eviction vase: ")
    assert message.endswith(remedy)
    assert "\n" not in message
    # The same engine without eviction is none of our business.
    if "runner" not in options:
        make_config(models.qwen3(), {"policy": "none"}, **options)


ARCHITECTURES = {
    "MLA": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "kv_lora_rank": 512,
            "q_lora_rank": 64,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 512,
            "max_position_embeddings": 4096,
            "torch_dtype": "bfloat16",
        },
        "multi-head latent attention",
    ),
    "encoder-decoder": (
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_target_positions": 4096,
            "vocab_size": 51865,
            "torch_dtype": "float32",
        },
        "encoder-decoder",
    ),
    "hybrid": (
        {
            "architectures": ["FalconH1ForCausalLM"],
            "model_type": "falcon_h1",
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "head_dim": 64,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "vocab_size": 512,
            "max_position_embeddings": 4096,
            "torch_dtype": "float32",
        },
        "state-space",
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unsupported_models(tmp_path, name):
    config, reason = ARCHITECTURES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EvictionError, match=f"--kv-eviction vase: .*{reason}.*; remove --kv"):
        make_config(tmp_path)


@pytest.mark.parametrize(
    "flag", ["decode_context_parallel_size", "prefill_context_parallel_size", "enable_dbo"]
)
def test_unsupported_parallelism(models, flag):
    """vLLM itself refuses most of these on a CPU; so ask the check about a config that says so."""
    from vase_vllm.config import EvictionConfig
    from vase_vllm.support import check_engine

    vllm_config = make_config(models.qwen3())
    setattr(vllm_config.parallel_config, flag, 2)
    with pytest.raises(EvictionError, match=f"remove --{flag.replace('_', '-')}$"):
        check_engine(vllm_config, EvictionConfig(budget=128, window=16))


def test_sleep_mode_is_left_to_vllm(models, monkeypatch):
    """On a CPU vLLM refuses it itself; where it is there, nothing of eviction stands against it.

    What running requests go through is in ``tests/end_to_end/test_engine_calls.py``.
    """
    for eviction in (EVICTION, {"policy": "none"}):
        with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
            make_config(models.qwen3(), eviction, enable_sleep_mode=True)
    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)
    config = make_config(models.qwen3(), enable_sleep_mode=True)
    assert config.model_config.enable_sleep_mode
    assert config.parallel_config.worker_cls.startswith("vase_vllm.worker.")


@pytest.mark.parametrize(
    ("eviction", "setting"),
    [
        ({"budget": 64}, "--kv-eviction-config: budget (64)"),
        ({"budget": 128, "rate": 1}, "--kv-eviction-config.rate: unknown key"),
        ({"policy": "lru"}, "--kv-eviction lru: unknown policy"),
    ],
    ids=["value", "key", "policy"],
)
def test_bad_settings_stop_the_engine(models, eviction, setting):
    with pytest.raises(EvictionError) as error:
        make_config(models.qwen3(), eviction)
    assert str(error.value).startswith(setting)


@pytest.mark.parametrize("key", ["kv_evict", "kv-eviction", "kv_evictions"])
def test_a_misspelt_key_is_said_to_switch_nothing_on(models, monkeypatch, key):
    warnings: list[str] = []
    monkeypatch.setattr(patches.logger, "warning", lambda text, *args: warnings.append(text % args))
    args = EngineArgs(model=str(models.qwen3()), additional_config={key: EVICTION, "other": 1})
    args.create_engine_config()
    assert warnings == [
        f"additional_config has {key!r}, which vase-vllm does not read: eviction is off. Did you "
        "mean 'kv_eviction'?"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {}, "caps its attention logits"),
        ("bloom", {}, "ALiBi"),
        ("llama4", {}, "KV cache of the kind ChunkedLocalAttention"),
    ],
    ids=["soft-cap", "alibi", "chunked-local"],
)
def test_unsupported_layers(models, family, changes, reason):
    from tests.support.engines import engine

    with (
        pytest.raises(EvictionError, match=reason),
        engine(getattr(models, family)(**changes), {"budget": 128, "window": 16}),
    ):
        pass
