"""A model directory of a config and a tokenizer, for ``--load-format dummy``."""

import json
from pathlib import Path
from typing import Any

from vase_vllm.tools.tiny_model import byte_tokenizer


def write_model_files(directory: Path, config: dict[str, Any]) -> None:
    """Write the config, and a tokenizer of bytes whose every further id is a word of its own.

    Weights that are made up sample any id of the vocabulary, and the server has to print it.
    """
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    byte_tokenizer(config["max_position_embeddings"]).save_pretrained(directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    known = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    tokenizer["model"]["vocab"] |= {f"w{id};": id for id in range(known, config["vocab_size"])}
    path.write_text(json.dumps(tokenizer))
