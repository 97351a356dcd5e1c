"""What is read from a config: without transformers what transformers says, and nothing unsaid."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vase_vllm.tools.plan.closed_form import FAMILIES, NoClosedFormError, from_config
from vase_vllm.tools.plan.model_files import read_config
from vase_vllm.tools.plan.model_shape import read_model_shape
from vase_vllm.tools.plan.transformers_model import from_transformers
from vase_vllm.tools.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
QWEN3_8B = ROOT / "benchmarks" / "models" / "qwen3-8b"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
}
# Keys as the families' published configs have them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "torch_dtype": "bfloat16", "attention_bias": False},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "phi3": {"model_type": "phi3", "sliding_window": None, "pad_token_id": 0},
    "phi3, wide window": {"model_type": "phi3", "sliding_window": 262144, "pad_token_id": 0},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 131072,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "dtype": "float16"},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
}


def write(directory: Path, *parts: dict[str, Any]) -> Path:
    config = {key: value for part in parts for key, value in part.items()}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_the_closed_form_is_what_transformers_counts(tmp_path: Path, config: dict[str, Any]):
    directory = write(tmp_path, SIZES, config)
    assert from_config(read_config(directory)) == from_transformers(directory)


def test_every_family_is_held_to_transformers():
    assert {config["model_type"] for config in PUBLISHED.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ["models/qwen3-8b", "models/qwen3-14b", "accuracy/testbed_model"])
def test_our_configs_are_read_as_transformers_reads_them(name: str):
    directory = ROOT / "benchmarks" / name
    assert from_config(read_config(directory)) == from_transformers(directory)


def test_a_tiny_model_is_read_as_transformers_reads_it(tmp_path: Path):
    make_tiny_model(tmp_path, layers=1)
    assert from_config(read_config(tmp_path)) == from_transformers(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt_neox"}, "models of type gpt_neox"),
        ({}, "models of type None"),
        ({"model_type": "qwen3"}, "without head_dim"),
        ({"model_type": "llama", "num_key_value_heads": None}, "without num_key_value_heads"),
        ({"model_type": "llama", "attention_bias": True}, "with attention_bias"),
        ({"model_type": "mistral"}, "without sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "with use_sliding_window"),
        ({**PUBLISHED["qwen3_moe"], "decoder_sparse_step": 2}, "with decoder_sparse_step"),
        ({**PUBLISHED["qwen3_moe"], "num_experts": 0}, "without the number of experts"),
    ],
    ids=str,
)
def test_what_the_closed_form_does_not_say_is_left_to_transformers(
    config: dict[str, Any], reason: str
):
    with pytest.raises(NoClosedFormError, match=reason):
        from_config({**SIZES, **config})


def test_transformers_fills_in_what_a_config_lacks(tmp_path: Path):
    shape, _ = read_model_shape(str(write(tmp_path, SIZES, {"model_type": "qwen3"})))
    assert shape.head_size == 128


def test_a_nested_text_config_is_read_by_transformers(tmp_path: Path):
    from transformers import LlavaConfig

    text = {**SIZES, **PUBLISHED["llama"]}
    LlavaConfig(text_config=text).save_pretrained(tmp_path)
    shape, longest = read_model_shape(str(tmp_path))
    assert (shape.num_layers, shape.num_kv_heads, longest) == (3, 2, 4096)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mistral", "sliding_window": 1024}, "this has sliding_attention"),
        (
            {**PUBLISHED["qwen3"], "layer_types": ["full_attention", "sliding_attention"]},
            "this has sliding_attention",
        ),
        ({"model_type": "t5", "d_model": 64, "num_heads": 4}, "encoder-decoder"),
        ({"model_type": "qwen3", "head_dim": 32, "dtype": "float8"}, "dtype float8"),
        (
            {"model_type": "qwen3", "head_dim": 32, "quantization_config": {"bits": 4}},
            "the weights are quantized, so their size is unknown",
        ),
        ({"model_type": "no_such_model"}, "the config cannot be read"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
):
    directory = write(tmp_path, SIZES, config)
    with pytest.raises(ValueError, match=message) as error:
        read_model_shape(str(directory))
    assert str(error.value).startswith(f"{directory}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_directory_without_a_config_is_refused(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="the config cannot be read"):
        read_model_shape(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/model", "./models/qwen", "a/b/c"])
def test_a_path_is_not_looked_up_on_the_hub(model: str):
    with pytest.raises(ValueError, match="there is no such directory"):
        read_model_shape(model)


# Where things are not installed, or there is no network

COMMAND = """
import sys
for name in sys.argv.pop(1).split():
    sys.modules[name] = None
from vase_vllm.tools.cli import main
sys.exit(main())
"""
NOTHING = "torch triton transformers tokenizers vllm huggingface_hub matplotlib safetensors"


def run(absent: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``vase-vllm`` in a process where the modules of ``absent`` cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, absent, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_plan_needs_nothing_for_a_directory():
    bare, full = (run(absent, "plan", str(QWEN3_8B), "--gpu", "h100") for absent in (NOTHING, ""))
    assert bare.returncode == 0, bare.stderr
    assert "tokens/s (predicted)" in bare.stdout
    assert bare.stdout == full.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "Qwen/Qwen3-8B", "--gpu", "h100"], "huggingface_hub: run pip install '.[plan]'"),
        (["plan", "{gpt_neox}", "--gpu", "h100"], "run pip install transformers torch"),
        (["inspect", "Qwen/Qwen3-8B", "--prompt", "hi"], "inspect needs vllm: run pip install"),
        (["tiny-model", "{new}"], "tiny-model needs torch: it comes with vLLM: run pip install"),
    ],
    ids=["plan, of the Hub", "plan, other model", "inspect", "tiny-model"],
)
def test_what_is_not_installed_is_named_with_the_remedy(
    tmp_path: Path, arguments: list[str], message: str
):
    write(tmp_path, {"model_type": "gpt_neox"})
    names = {"{gpt_neox}": str(tmp_path), "{new}": str(tmp_path / "new")}
    result = run(NOTHING, *(names.get(word, word) for word in arguments))
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


def test_the_hub_is_asked_once(tmp_path: Path):
    arguments = ["plan", "Qwen/Qwen3-8B", "--gpu", "h100"]
    result = run("torch transformers vllm", *arguments, HF_HOME=str(tmp_path), **NO_HUB)
    assert result.returncode == 2
    # A retry would be announced in a line of its own.
    assert result.stderr.count("\n") == 1
    assert "Qwen/Qwen3-8B is no directory here, and its config cannot be read" in result.stderr
    assert "give a directory with its config.json" in result.stderr


def test_a_config_in_the_cache_needs_no_network(tmp_path: Path):
    repository = tmp_path / "hub" / "models--Qwen--Qwen3-8B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((QWEN3_8B / "config.json").read_text())
    arguments = ["plan", "Qwen/Qwen3-8B", "--gpu", "h100"]
    result = run("torch transformers vllm", *arguments, HF_HOME=str(tmp_path), **NO_HUB)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Qwen/Qwen3-8B: per GPU 15.3 GiB of weights")
