"""Finds a model's ``config.json`` and the size of its weights, in a directory or on the Hub."""

import json
from pathlib import Path
from typing import Any

from vase_vllm.tools.requirements import require

TIMEOUT = 5.0
"""Seconds that the Hub has to say whether it has the config."""


def find_directory(model: str) -> Path:
    """Return the directory of a model's ``config.json``.

    Args:
        model: a local directory, or an id on the Hugging Face Hub. Of the latter the config alone
            is downloaded, unless the Hub's cache on this machine has it.

    Raises:
        ValueError: there is none; one line.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    if not _is_hub_id(model):
        raise ValueError(f"{model}: there is no such directory")
    require(f"{model} is no directory here, and the Hugging Face Hub", ["huggingface_hub"])
    return _download_config(model).parent


def _is_hub_id(model: str) -> bool:
    return not model.startswith(("/", ".", "~")) and model.count("/") <= 1


def _download_config(model: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = "config.json"
    try:
        try:
            return Path(hf_hub_download(model, name, local_files_only=True))
        except LocalEntryNotFoundError:
            # A download tries again and again where there is no network; this asks once.
            get_hf_file_metadata(hf_hub_url(model, name), timeout=TIMEOUT)
            return Path(hf_hub_download(model, name))
    except Exception as error:  # of the HTTP library, which differs between versions
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{model} is no directory here, and its config cannot be read from the Hugging Face "
            f"Hub ({reason}): give a directory with its config.json"
        ) from None


def read_config(directory: Path) -> dict[str, Any]:
    """Read a ``config.json``.

    Raises:
        ValueError: it cannot be read; one line.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"the config cannot be read: config.json: {reason}") from None
    if not isinstance(config, dict):
        raise ValueError("the config cannot be read: config.json: not an object")
    return config


def weight_bytes(directory: Path) -> int:
    """Bytes of the safetensors files in a directory, from their index if there is one; else 0.

    The header of a file is counted with its tensors; it is a few bytes for each of them.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return int(json.loads(index.read_text()).get("metadata", {}).get("total_size", 0))
    return sum(path.stat().st_size for path in directory.glob("model*.safetensors"))
