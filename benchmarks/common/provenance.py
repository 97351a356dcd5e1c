"""Where numbers come from: the day, the command, the machine and the versions."""

import hashlib
import shlex
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vase_vllm.tools.provenance import machine, versions


def provenance(packages: Iterable[str] = ("vllm", "torch", "vase-vllm")) -> dict[str, Any]:
    """What the result file of a ``python -m`` command says about itself."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name] if spec else [sys.argv[0]]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(packages),
    }


def source_digest(*folders: Path) -> str:
    """A name for the Python sources of some folders, so that results of others are told apart."""
    digest = hashlib.sha256()
    for folder in folders:
        # A folder that is a link is not entered by rglob.
        for path in sorted(folder.resolve().rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
