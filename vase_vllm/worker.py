"""vLLM's workers, with eviction around their model's attention layers."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from vase_vllm.backend import wrap_layers
from vase_vllm.config import EvictionConfig
from vase_vllm.support import check_pool


class _EvictionMixin(Worker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then wrap the attention backends that it was given."""
        super().load_model(*args, **kwargs)
        config = EvictionConfig.from_vllm(self.vllm_config)
        assert config is not None, "this worker is chosen only where eviction is on"
        self._eviction_config = config
        self._eviction_counters = wrap_layers(self.vllm_config, config)

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache; refuses a pool that cannot hold one sequence at its bound."""
        num_bytes = super().determine_available_memory()
        specs = self.get_kv_cache_spec().values()
        num_required = sum(spec.max_memory_usage_bytes(self.vllm_config) for spec in specs)
        check_pool(self._eviction_config, num_bytes, num_required)
        return num_bytes

    def get_kv_eviction_stats(self) -> dict[str, int]:
        """Evictions so far on this worker, for ``collective_rpc``."""
        return self._eviction_counters.as_dict()


class EvictionCPUWorker(_EvictionMixin, CPUWorker):
    """Worker of the CPU platform."""
