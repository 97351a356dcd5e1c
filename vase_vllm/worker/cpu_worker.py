"""vLLM's CPU worker under eviction; apart, because it imports what only a CPU build has."""

from typing import Any

from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from vase_vllm.engine.eviction_time import put_microseconds
from vase_vllm.worker.seeded_requests import prepare_to_rewind
from vase_vllm.worker.worker import EvictionWorkerMixin


class EvictionCPUWorker(EvictionWorkerMixin, CPUWorker):
    """Worker of the CPU platform."""

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's sampling, from generators that it can rewind; says how long evictions took."""
        if not self.use_v2_model_runner:
            prepare_to_rewind(self.model_runner)
        output = super().sample_tokens(*args, **kwargs)
        microseconds = self._eviction.counters.take_microseconds()
        if microseconds and isinstance(output, ModelRunnerOutput):
            return put_microseconds(output, microseconds)
        return output
