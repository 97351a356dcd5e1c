"""vLLM's worker, with eviction around its model's attention layers."""

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_worker import Worker

from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.layout.block_table_row import RowHeader
from vase_vllm.support import check_pool
from vase_vllm.worker.backend import full_attention_layers, wrap_layers
from vase_vllm.worker.counters import EvictionCounters
from vase_vllm.worker.evictor import EvictionObserver
from vase_vllm.worker.request_status import request_status
from vase_vllm.worker.row_headers import RowHeaders
from vase_vllm.worker.self_check import check_evictions
from vase_vllm.worker.step import StepContext

if TYPE_CHECKING:
    from vase_vllm.worker.warm_up import KernelWarmUp


class EvictionWorkerMixin(Worker):
    """What eviction adds to a worker of any platform."""

    _kernels: "KernelWarmUp | None" = None
    _warming_up = False
    _latest_step = SchedulerOutput.make_empty()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then wrap the attention backends that it was given."""
        super().load_model(*args, **kwargs)
        config = EvictionConfig.from_vllm(self.vllm_config)
        assert config is not None, "this worker is chosen only where eviction is on"
        self._eviction = StepContext(
            config=config,
            vllm_config=self.vllm_config,
            device=self.device,
            counters=EvictionCounters(num_layers=len(full_attention_layers(self.vllm_config))),
            row_headers=RowHeaders(
                self.model_runner, self.vllm_config.scheduler_config.max_num_seqs
            ),
        )
        wrap_layers(self._eviction)
        if self._eviction.runs_in_triton:
            from vase_vllm.worker.warm_up import KernelWarmUp

            self._kernels = KernelWarmUp()

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache; refuses a pool that cannot hold one sequence at its bound."""
        num_bytes = super().determine_available_memory()
        specs = self.get_kv_cache_spec().values()
        num_required = sum(spec.max_memory_usage_bytes(self.vllm_config) for spec in specs)
        check_pool(self._eviction.config, num_bytes, num_required)
        return num_bytes

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache, and note which group's block-table rows have a header."""
        # Those of builders that have measured the memory of CUDA graphs; vLLM makes others here.
        self._eviction.paths.clear()
        super().initialize_from_config(kv_cache_config)
        self._kv_cache_config = kv_cache_config
        self._eviction_groups = {
            index: group.kv_cache_spec
            for index, group in enumerate(kv_cache_config.kv_cache_groups)
            if isinstance(group.kv_cache_spec, EvictionSpec)
        }

    def compile_or_warm_up_model(self) -> Any:
        """Compile the kernels, warm up, then prove that evictions happen.

        vLLM's dummy requests have block-table rows without our header.
        """
        self._warming_up = True
        try:
            if self._kernels is not None:
                self._kernels.run(self.model_runner)
            times = super().compile_or_warm_up_model()
        finally:
            self._warming_up = False
        if self._eviction.config.self_check:
            steps = self.execute_model, self.sample_tokens
            check_evictions(steps, self._eviction, self._kv_cache_config)
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step. The message that starts it says when its new sequences will evict."""
        if self._warming_up:
            for request in scheduler_output.scheduled_new_reqs:
                request.block_ids = tuple(
                    self._complete_row(request, index, row)
                    for index, row in enumerate(request.block_ids)
                )
        # All groups' rows say the same.
        self._eviction.row_headers.observe(scheduler_output, min(self._eviction_groups))
        if scheduler_output.total_num_scheduled_tokens:
            self._latest_step = scheduler_output
        return super().execute_model(scheduler_output)

    def _complete_row(self, request: Any, group: int, row: list[int]) -> list[int]:
        """A dummy request's block-table row, with the header and the state blocks of ours."""
        spec = self._eviction_groups.get(group)
        if spec is None:
            return row
        num_prompt = len(request.prompt_token_ids)
        schedule = spec.schedule.for_prompt(num_prompt)
        header = RowHeader(schedule.first_eviction(num_prompt), 0, schedule.budget, kept=0)
        # Any block of its own does for a warm-up, also in the place of state blocks.
        longest = self.vllm_config.model_config.max_model_len
        num_missing = spec.num_row_blocks(longest, header.first) - len(row)
        return [*header, *row, *[row[0]] * num_missing]

    def observe_evictions(self, observer: EvictionObserver) -> None:
        """Let an object of this process look at all evictions from now on."""
        self._eviction.observer = observer

    def get_kv_eviction_stats(self) -> dict[str, int]:
        """Evictions so far on this worker, for ``collective_rpc``."""
        return self._eviction.counters.as_dict()

    def get_kv_eviction_requests(self) -> list[dict[str, Any]]:
        """What the requests of the latest step hold, for ``collective_rpc``."""
        return request_status(
            self._latest_step,
            self._eviction.row_headers.by_request,
            self._eviction.config.schedule,
        )


class EvictionWorker(EvictionWorkerMixin):
    """Worker of the CUDA platform."""
