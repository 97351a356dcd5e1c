"""The tiny model: what transformers and vLLM will load, and the command that writes it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vase_vllm import __version__
from vase_vllm.tools import cli
from vase_vllm.tools.tiny_model import PRINTABLE, SPECIAL_TOKENS, make_tiny_model

SMALL = {
    "layers": 2,
    "hidden_size": 64,
    "query_heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", **SMALL, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(directory: Path):
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def test_config_has_the_shape_that_was_asked_for(directory: Path):
    config = AutoConfig.from_pretrained(directory)
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.num_hidden_layers == 2
    assert config.hidden_size == 64
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 32)
    assert config.vocab_size == 320
    assert config.max_position_embeddings == 32768


def test_weights_are_complete(directory: Path):
    _, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_in_config_and_weights(tmp_path: Path, dtype: str):
    make_tiny_model(tmp_path, **SMALL, dtype=dtype)
    assert AutoConfig.from_pretrained(tmp_path).dtype == getattr(torch, dtype)
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}


def test_weights_are_a_function_of_the_seed(tmp_path: Path, directory: Path):
    def weights(path: Path) -> bytes:
        return (path / "model.safetensors").read_bytes()

    torch.manual_seed(123)  # the global generator has no part in it
    same = make_tiny_model(tmp_path / "same", **SMALL, dtype="float32", seed=0)
    other = make_tiny_model(tmp_path / "other", **SMALL, dtype="float32", seed=1)
    assert weights(same) == weights(directory)
    assert weights(other) != weights(directory)


def without_special_tokens(text: str) -> bool:
    return not any(token in text for token in SPECIAL_TOKENS)


@settings(deadline=None)
@given(text=st.text().filter(without_special_tokens))
def test_tokens_are_utf8_bytes(tokenizer, text: str):
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(data=st.binary(min_size=1))
def test_any_bytes_decode(tokenizer, data: bytes):
    assert tokenizer.decode(list(data)) == data.decode(errors="replace")


def test_special_tokens_follow_the_bytes(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [256, 257, 258]
    assert tokenizer("a<|im_end|>b").input_ids == [ord("a"), 257, ord("b")]
    assert tokenizer.decode([ord("a"), 257], skip_special_tokens=True) == "a"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüß dich"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nGrüß dich<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def generate(model, tokenizer, prompt: str, tokens: int = 200) -> list[int]:
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, top_k=0)
    return output[0, inputs.input_ids.shape[1] :].tolist()


def test_text_is_printable_varied_and_does_not_end(model, tokenizer):
    ids = generate(model, tokenizer, "Hello")
    assert len(ids) == 200
    assert set(ids) <= set(PRINTABLE)
    assert len(set(ids)) > 20


def test_context_decides_what_comes_out(model, tokenizer):
    ids = generate(model, tokenizer, "Hello, you", 50)
    assert ids != generate(model, tokenizer, "Jello, you", 50)


def test_unprintable_model_emits_any_byte_but_no_special_token(tmp_path: Path):
    make_tiny_model(tmp_path, **SMALL, dtype="float32", printable=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = set(generate(model, AutoTokenizer.from_pretrained(tmp_path), "Hello"))
    assert max(ids) < 256
    assert not ids <= set(PRINTABLE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"query_heads": 3}, r"query_heads \(3\)"),
        ({"layers": 0}, r"layers \(0\) must be at least 1"),
    ],
    ids=["dtype", "heads", "layers"],
)
def test_impossible_options_are_refused_by_name(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_tiny_model(tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_command_writes_what_the_function_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    # Underscores in flags are dashes, as for vLLM.
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    target = tmp_path / "command"
    assert cli.main(["tiny-model", str(target), *options, "--no-printable", "--seed=7"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    expected = make_tiny_model(tmp_path / "function", **SMALL, printable=False, seed=7)
    files = {path.name: path.read_bytes() for path in expected.iterdir()}
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files


def test_command_reports_impossible_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["tiny-model", str(tmp_path), "--kv-heads=3"]) == 2
    assert "query_heads (8)" in capsys.readouterr().err


def test_command_reports_a_place_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    assert cli.main(["tiny-model", str(tmp_path / "file" / "model")]) == 2
    errors = capsys.readouterr().err
    assert "Not a directory" in errors
    assert errors.count("\n") == 1


def test_command_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"vase-vllm {__version__}\n"


def test_command_is_light_to_import():
    heavy = {"torch", "vllm", "transformers"}
    code = f"import sys, vase_vllm.tools.cli; print({heavy} & set(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    assert output.stdout == "set()\n"
