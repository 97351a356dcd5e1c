"""vLLM's CPU worker under eviction; apart, because it imports what only a CPU build has."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vase_vllm.worker.worker import EvictionWorkerMixin


class EvictionCPUWorker(EvictionWorkerMixin, CPUWorker):
    """Worker of the CPU platform."""
