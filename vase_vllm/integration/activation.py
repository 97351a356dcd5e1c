"""Turns eviction on in an engine's config, and off for everything else."""

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.support import check_engine

logger = init_logger("vllm.vase_vllm")


def prepare(engine_args: EngineArgs) -> EvictionConfig | None:
    """Check the settings and adjust what must be right before vLLM makes its config.

    Returns:
        The settings, or None where eviction is off.

    Raises:
        EvictionError: one line that names the setting and the remedy.
    """
    config = EvictionConfig.from_additional(engine_args.additional_config)
    if config is None:
        return None
    for flag, value, default in (
        ("--worker-cls", engine_args.worker_cls, "auto"),
        ("--scheduler-cls", engine_args.scheduler_cls, None),
    ):
        if value != default:
            raise EvictionError(
                f"--kv-eviction {config.policy.name}: a custom {flag} is not supported; "
                f"remove {flag}"
            )
    return config


def activate(vllm_config: VllmConfig, config: EvictionConfig) -> None:
    """Refuse what is not supported, then choose the worker and the scheduler that evict."""
    check_engine(vllm_config, config)
    vllm_config.parallel_config.worker_cls = (
        "vase_vllm.worker.cpu_worker.EvictionCPUWorker"
        if current_platform.is_cpu()
        else "vase_vllm.worker.worker.EvictionWorker"
    )
    is_async = vllm_config.scheduler_config.async_scheduling
    vllm_config.scheduler_config.scheduler_cls = (
        "vase_vllm.engine.scheduler.EvictionAsyncScheduler"
        if is_async
        else "vase_vllm.engine.scheduler.EvictionScheduler"
    )
    logger.info(
        "KV eviction: %s, at most %d + %d tokens per sequence, layer and KV head (%s).",
        config.policy.name,
        config.budget,
        config.window,
        config,
    )
    if config.fused is None and not current_platform.is_cpu():
        logger.warning(
            "KV eviction: %s with these settings is not in the fused kernel: it evicts in plain "
            "torch, sequence by sequence, which is slow.",
            config.policy.name,
        )
