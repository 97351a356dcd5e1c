"""Tells one model from another."""

import hashlib
from pathlib import Path

CHUNK = 1 << 22


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def model_fingerprint(model: str, revision: str | None) -> str:
    """What changes whenever the model does.

    Args:
        model: a directory, of which every file is read, or a Hugging Face id.
        revision: of the id.

    Returns:
        A hash of the directory's files, or the commit of the Hugging Face repository.

    Raises:
        OSError: the model cannot be found.
    """
    directory = Path(model)
    if directory.is_dir():
        total = hashlib.sha256()
        for path in sorted(path for path in directory.iterdir() if path.is_file()):
            total.update(f"{path.name} {path.stat().st_size} ".encode())
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    total.update(chunk)
        return total.hexdigest()
    from huggingface_hub import snapshot_download

    # The folder of a snapshot is named after its commit.
    return Path(snapshot_download(model, revision=revision, allow_patterns="config.json")).name
