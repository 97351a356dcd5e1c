"""The peak memory of a system while it runs."""

import threading
from collections.abc import Callable

import psutil
from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml

from benchmarks.common.monitor import resources

SAMPLE_SECONDS = 0.1


def device_mib() -> float | None:
    """Memory of the GPU that is in use, by whomever; None without a GPU."""
    if not current_platform.is_cuda():
        return None
    pynvml = import_pynvml()
    pynvml.nvmlInit()
    index = current_platform.device_id_to_physical_device_id(0)
    used: int = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).used
    return used / 2**20


class PeakMemory:
    """Samples processes in a thread; use as a context manager.

    Attributes:
        rss_mib: most resident memory of all processes together. Pages that processes share, of
            libraries for instance, count in each of them.
        device_mib: most memory of the GPU in use; None without a GPU.
    """

    def __init__(self, processes: Callable[[], list[psutil.Process]]) -> None:
        self.rss_mib = 0.0
        self.device_mib: float | None = None
        self._processes = processes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.rss_mib = max(self.rss_mib, resources(self._processes)["rss_mib"])
        if (used := device_mib()) is not None:
            self.device_mib = max(self.device_mib or 0.0, used)
