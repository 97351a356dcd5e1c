"""vLLM's schedulers, with evictions falling between two steps."""

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vase_vllm.config import EvictionConfig
from vase_vllm.engine.admission import AdmissionContext
from vase_vllm.engine.block_manager import EvictionManager
from vase_vllm.engine.eviction_time import take_microseconds
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.engine.statistics import EvictionStatistics
from vase_vllm.errors import EvictionError
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.request_settings import wants_report

logger = init_logger("vllm.vase_vllm")


class _EvictionMixin(Scheduler):
    """Binds the block managers to the requests and ends chunks where evictions fall.

    A preempted sequence prefills its prompt again, then recomputes its output in chunks that end
    where its evictions fall. It goes through the same cache states as the first time, so its
    continuation does not depend on whether, or when, it was preempted. A bounded prefill computes
    the prompt in such chunks, too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._managers = [
            manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, EvictionManager)
        ]
        config = EvictionConfig.from_vllm(self.vllm_config)
        assert config is not None, "this scheduler is chosen only where eviction is on"
        self._admission = AdmissionContext(self.requests, config, self.max_model_len)
        for manager in self._managers:
            manager.bind(self._admission)
        # All groups share one schedule: any manager knows when a request evicts.
        self._manager = self._managers[0]
        self._eviction_schedule = config.schedule
        self._statistics = EvictionStatistics()
        # The waiting request that was looked up last, its cached blocks, and their tokens.
        self._asked: tuple[Request, KVCacheBlocks, int] | None = None
        self._log_capacity()
        if len(self.kv_cache_config.kv_cache_groups) > 1:
            self._check_longest_prompt()

    def _log_capacity(self) -> None:
        """Say what vLLM's own lines about KV cache and scheduler mean under eviction."""
        spec = self._manager.kv_cache_spec
        num_blocks = self.kv_cache_config.num_blocks
        num_each = spec.num_blocks(spec.schedule.bound)
        config = self._admission.config
        logger.info(
            "KV eviction: %s, budget %d: a sequence that has evicted holds %d of the %s KV cache "
            "blocks (of %d tokens)%s, so that at most %d fit at once (admission: %s). vLLM's own "
            "figures above count a sequence as --max-model-len tokens. The custom scheduler class "
            "of vLLM's warning is vase-vllm's.",
            config.policy.name,
            config.budget,
            num_each,
            f"{num_blocks - 1:,}",
            spec.block_size,
            self._what_else_is_held(),
            (num_blocks - 1) // num_each,
            config.admission,
        )

    def _what_else_is_held(self) -> str:
        """What takes blocks of the pool beside budgets and windows, for the log."""
        if self._eviction_schedule.keeps_prompt:
            return " beside those of its prompt"
        if len(self.kv_cache_config.kv_cache_groups) > 1:
            return " beside those of the other layers"
        return ""

    def _check_longest_prompt(self) -> None:
        """Refuse a hybrid model's pool that cannot hold a prompt of the model's length.

        The API server refuses prompts that can never fit, but it does not know how many blocks
        the other groups of a hybrid model take beside ours.
        """
        first = self._eviction_schedule.first_eviction(self.max_model_len)
        num_required = 0
        for group in self.kv_cache_config.kv_cache_groups:
            spec = group.kv_cache_spec
            if isinstance(spec, EvictionSpec):
                num_required += spec.num_row_blocks(self.max_model_len, first)
            else:
                num_bytes = spec.max_memory_usage_bytes(self.vllm_config)
                num_required += cdiv(num_bytes, spec.page_size_bytes)
        num_usable = self.kv_cache_config.num_blocks - 1
        if num_required > num_usable:
            raise EvictionError(
                f"--kv-eviction: a prompt of --max-model-len {self.max_model_len} needs "
                f"{num_required} KV cache blocks in this hybrid model, and the pool has "
                f"{num_usable}: set --kv-eviction-config.prefill bounded, lower --max-model-len, "
                "or raise --kv-cache-memory-bytes or --gpu-memory-utilization"
            )

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """vLLM's look into the prefix cache, for a request that waits.

        The last ``window`` queries in front of the first eviction must be computed: they score it.
        What this very step computes for another request can be shared, but not be copied. And a hit
        is dropped where the pool has no room for it beside the copies that the sequence gets:
        computing the prompt beats waiting, perhaps for ever.
        """
        for manager in self._managers:
            manager.latest_admission = None
        blocks, num_hit, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        cache = self.kv_cache_manager
        most = self._eviction_schedule.first_query(self._manager.first_eviction(request.request_id))
        for manager in self._managers if num_hit > 0 else ():
            of_group = blocks.blocks[manager.kv_cache_group_id]
            most = min(most, manager.num_ready(request.request_id, of_group))
        if num_hit > most:
            found, num_hit, _ = cache.coordinator.find_longest_cache_hit(request.block_hashes, most)
            blocks, boundary = cache.create_kv_cache_blocks(found), 0
        if num_hit > 0:
            num_required = self._num_blocks_to_admit(request, blocks, num_hit)
            if num_required + cache.watermark_blocks > cache.block_pool.get_num_free_blocks():
                blocks, num_hit, boundary, diverged = cache.empty_kv_cache_blocks, 0, 0, False
        self._asked = request, blocks, num_hit
        return blocks, num_hit, boundary, diverged

    def _num_blocks_to_admit(
        self, request: Request, blocks: KVCacheBlocks, num_hit: int, keep_free: bool = True
    ) -> int:
        """Blocks that must be free to admit a request whose prompt begins with cached blocks.

        Args:
            keep_free: whether those count that are kept for running requests.
        """
        num_tokens = min(request.num_tokens, self.max_model_len)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        return sum(
            manager.get_num_blocks_to_allocate(
                request_id=request.request_id,
                num_tokens=num_tokens,
                new_computed_blocks=of_group,
                total_computed_tokens=num_hit,
                num_local_computed_tokens=num_hit,
                num_tokens_main_model=request.num_tokens,
                apply_admission_cap=keep_free or manager not in self._managers,
            )
            for manager, of_group in zip(managers, blocks.blocks, strict=True)
        )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """vLLM's hook on a preemption."""
        if self.log_stats:
            num_computed = request.num_computed_tokens
            has_evicted = num_computed > self._manager.first_eviction(request.request_id)
            self._statistics.count_preemption(num_computed, has_evicted)
        super()._preempt_request(request, *args, **kwargs)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """vLLM's hook on the end of scheduling: count admissions, and evictions before the step."""
        if self.log_stats:
            self._count_admissions(scheduler_output)
            for request_id in scheduler_output.num_scheduled_tokens:
                position = self.requests[request_id].num_computed_tokens
                first = self._manager.first_eviction(request_id)
                # Those that are below their first eviction need not ask the schedule.
                if position >= first and self._eviction_schedule.due(position, first):
                    own = self._eviction_schedule.with_budget(
                        self._manager.numbers(request_id).budget
                    )
                    self._statistics.evictions += 1
                    self._statistics.evicted_tokens += own.num_cached(position, first) - own.budget
        super()._update_after_schedule(scheduler_output)

    def _count_admissions(self, scheduler_output: SchedulerOutput) -> None:
        """Count who begins to run, and why the request that asked last does not."""
        counted = self._statistics
        counted.admissions += len(scheduler_output.scheduled_new_reqs)
        counted.admissions += len(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        asked, self._asked = self._asked, None
        if asked is None or asked[0].request_id in scheduler_output.num_scheduled_tokens:
            return
        answers = [a for a in (manager.latest_admission for manager in self._managers) if a]
        if not answers:
            # It was not about memory.
            return
        num_required = self._num_blocks_to_admit(*asked, keep_free=False)
        if self.running:
            num_required += self.kv_cache_manager.watermark_blocks
        if num_required > answers[0].num_free:
            counted.deferrals_full += 1
        elif num_required + sum(answer.num_kept_free for answer in answers) > answers[0].num_free:
            counted.deferrals_promised += 1

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """What vLLM makes of a step's output; a CPU's worker says in it how long evictions took."""
        self._statistics.eviction_microseconds += take_microseconds(model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics of a step, and ours."""
        stats = super().make_stats(*args, **kwargs)
        if stats is None:
            return None
        counted, self._statistics = self._statistics, EvictionStatistics()
        # In every step: plain sums, and the schedule is asked about those that have evicted. Numpy
        # takes six times as long for 8 requests, and saves a fifth for thousands.
        held = logical = evicting = 0
        for request in self.running:
            position = request.num_computed_tokens
            logical += position
            first = self._manager.first_eviction(request.request_id)
            if position <= first:
                held += position
                continue
            budget = self._manager.numbers(request.request_id).budget
            held += self._eviction_schedule.slots(position - 1, first, budget) + 1
            evicting += 1
        counted.held_tokens, counted.logical_tokens = held, logical
        counted.evicting_requests = evicting
        counted.outstanding_blocks = sum(manager.num_outstanding for manager in self._managers)
        counted.released_blocks = sum(manager.take_num_released() for manager in self._managers)
        counted.put_into(stats)
        return stats

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """vLLM's hook on the end of a request: its output's length predicts those to come.

        A report that the request has asked for goes where a KV connector's answer would go, which
        reaches the client in ``kv_transfer_params``.
        """
        if request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED):
            cut_off = request.status == RequestStatus.FINISHED_LENGTH_CAPPED
            self._admission.output_lengths.add(request.num_output_tokens, cut_off)
        sampling = request.sampling_params
        if sampling is None or not wants_report(sampling.extra_args):
            return super()._free_request(request, *args, **kwargs)
        report = self._report(request)
        kv_params, *others = super()._free_request(request, *args, **kwargs)
        return {**(kv_params or {}), "kv_eviction": report}, *others

    def _report(self, request: Request) -> dict[str, int]:
        """What a request that has ended has evicted, and holds per layer and KV head."""
        numbers = self._manager.numbers(request.request_id)
        # The last token of an output is never fed back to the model.
        last_read = max(request.num_tokens - 2, 0)
        own = self._eviction_schedule.with_budget(numbers.budget)
        return own.figures(last_read, numbers.first)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM's hook on the end of a chunk, called for every request that is scheduled."""
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        if num_new_tokens <= 1:
            return num_new_tokens
        first = self._manager.first_eviction(request.request_id)
        return min(
            num_new_tokens,
            self._eviction_schedule.tokens_until_eviction(num_computed_tokens, first),
        )


class EvictionScheduler(_EvictionMixin):
    """For engines without async scheduling."""


class EvictionAsyncScheduler(_EvictionMixin, AsyncScheduler):
    """For engines with async scheduling, vLLM's default."""
