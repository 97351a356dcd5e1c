"""Where numbers come from: the machine and the versions."""

import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    import psutil
    from vllm.platforms import current_platform

    device = current_platform.get_device_name() if current_platform.is_cuda() else None
    return {"processor": _processor(), "cores": psutil.cpu_count(), "accelerator": device}


@cache
def _processor() -> str:
    """Its name, which takes a second to find out."""
    import cpuinfo

    return cpuinfo.get_cpu_info().get("brand_raw", platform.machine())


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
