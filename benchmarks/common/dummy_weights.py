"""A model directory of a config and a tokenizer, to be served with ``--load-format dummy``."""

import json
from pathlib import Path
from typing import Any

from vase_vllm.tools.tiny_model import byte_tokenizer

NEVER_ENDS = {"eos_token_id": 257, "bos_token_id": None}
"""The end-of-text token of the tokenizer of bytes."""


def write_dummy_model(
    directory: Path, model: Path, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write a model's config, and a tokenizer of bytes whose every further id is a word of its own.

    A model with dummy weights samples any id of the vocabulary, and the server has to print it.

    Args:
        directory: where to; it exists.
        model: directory of the config.
        changes: of the config.

    Returns:
        The config that was written.
    """
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    config |= {**(changes or {}), **NEVER_ENDS}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    byte_tokenizer(config["max_position_embeddings"]).save_pretrained(directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    known = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    tokenizer["model"]["vocab"] |= {f"w{id};": id for id in range(known, config["vocab_size"])}
    path.write_text(json.dumps(tokenizer))
    return config
