"""Where numbers come from: the day, the command, the machine and the versions."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform


def processor() -> str:
    """Name of the processor, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"model name\s*: (.*)", info.read_text())):
        return match[1]
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    device = current_platform.get_device_name() if current_platform.is_cuda() else None
    return {"processor": processor(), "cores": os.cpu_count(), "accelerator": device}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


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
