"""Where numbers come from: the day, the command, the machine and the versions."""

import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import cpuinfo
import psutil
from vllm.platforms import current_platform


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    device = current_platform.get_device_name() if current_platform.is_cuda() else None
    processor = cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
    return {"processor": processor, "cores": psutil.cpu_count(), "accelerator": device}


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
