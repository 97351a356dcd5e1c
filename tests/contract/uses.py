"""Which symbols of vLLM the plugin uses: found in its own sources, and those that no source names.

python -m tests.contract.uses      # writes the table anew from the installed vLLM
"""

import ast
import importlib.util
import json
import sys
from pathlib import Path

from tests.contract.sources import Function, Sources

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("vllm.json")

REACHED = {
    "vllm.config:VllmConfig": "additional_config cache_config model_config parallel_config "
    "scheduler_config speculative_config kv_transfer_config lora_config",
    "vllm.config.cache:CacheConfig": "block_size cache_dtype kv_offloading_size num_gpu_blocks",
    "vllm.config.model:ModelConfig": "dtype get_num_attention_heads get_num_kv_heads "
    "get_sliding_window get_total_num_kv_heads get_vocab_size is_attention_free is_diffusion "
    "is_encoder_decoder is_hybrid is_mm_prefix_lm max_model_len runner_type rswa_window "
    "served_model_name use_mla",
    "vllm.config.parallel:ParallelConfig": "data_parallel_size data_parallel_size_local "
    "decode_context_parallel_size enable_dbo local_engines_only prefill_context_parallel_size "
    "worker_cls",
    "vllm.config.scheduler:SchedulerConfig": "async_scheduling max_num_batched_tokens max_num_seqs "
    "scheduler_cls",
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorStats": "data",
    "vllm.engine.arg_utils:EngineArgs": "add_cli_args additional_config create_engine_config "
    "from_cli_args scheduler_cls worker_cls",
    "vllm.engine.protocol:EngineClient": "collective_rpc",
    "vllm.model_executor.layers.attention:Attention": "attn_backend get_kv_cache_spec head_size "
    "head_size_v impl kv_cache kv_sharing_target_layer_name layer_name num_heads num_kv_heads",
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin": "attach_router init_state name "
    "required_tasks",
    "vllm.sampling_params:SamplingParams": "extra_args max_tokens seed",
    "vllm.v1.core.block_pool:BlockPool": "cache_full_blocks evict_blocks free_blocks "
    "get_cached_block get_new_blocks get_num_free_blocks touch",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": "find_longest_cache_hit "
    "single_type_managers",
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "block_pool coordinator "
    "create_kv_cache_blocks empty_kv_cache_blocks watermark_blocks",
    "vllm.v1.core.sched.output:CachedRequestData": "make_empty new_block_ids new_token_ids "
    "num_computed_tokens num_output_tokens req_ids resumed_req_ids",
    "vllm.v1.core.sched.output:NewRequestData": "block_ids from_request num_computed_tokens "
    "prompt_token_ids req_id",
    "vllm.v1.core.sched.output:SchedulerOutput": "finished_req_ids make_empty num_scheduled_tokens "
    "scheduled_cached_reqs scheduled_new_reqs total_num_scheduled_tokens",
    "vllm.v1.core.sched.scheduler:Scheduler": "kv_cache_config kv_cache_manager log_stats "
    "max_model_len requests running",
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager": "_null_block "
    "_record_new_block_ids block_pool block_size kv_cache_group_id kv_cache_spec new_block_ids "
    "num_cached_block req_to_blocks",
    "vllm.v1.engine.input_processor:InputProcessor": "process_inputs vllm_config",
    "vllm.v1.engine.parallel_sampling:ParentRequest": "get_child_info",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups num_blocks",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm.v1.metrics.loggers:StatLoggerManager": "__init__",
    "vllm.v1.metrics.stats:SchedulerStats": "num_kv_fetch_reqs_by_stage",
    "vllm.v1.outputs:KVConnectorOutput": "kv_connector_stats",
    "vllm.v1.outputs:ModelRunnerOutput": "kv_connector_output",
    "vllm.v1.request:Request": "block_hashes num_computed_tokens num_output_tokens "
    "num_prompt_tokens num_tokens prompt_token_ids request_id sampling_params status",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": "_dummy_run req_states",
    "vllm.v1.worker.gpu.states:RequestState": "req_id_to_index",
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": "generator",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "generators num_reqs req_ids",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": "_dummy_run discard_request_mask "
    "input_batch requests",
    "vllm.v1.worker.gpu_worker:Worker": "device model_runner sample_tokens vllm_config",
}
"""Members that the plugin reads, calls or patches on objects that vLLM hands it, by class."""


def installed() -> Path:
    """The directory that holds the installed vLLM."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def uses(vllm: Sources) -> set[str]:
    """Symbols as ``module:name`` and ``module:Class.member``.

    They are imports, methods of vLLM's classes that ours override, and :data:`REACHED`.
    """
    found = {f"{of}.{name}" for of, names in REACHED.items() for name in names.split()}
    for path in (ROOT / "vase_vllm").rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
            for alias in node.names
        }
        found |= {f"{module}:{name}" for module, name in imported.values()}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found |= _overridden(vllm, node, imported)
    return found


def _overridden(
    vllm: Sources, node: ast.ClassDef, imported: dict[str, tuple[str, str]]
) -> set[str]:
    """The methods of vLLM's classes that a class of ours defines again."""
    ours = {child.name for child in node.body if isinstance(child, Function)}
    found = set()
    for base in node.bases:
        if not isinstance(base, ast.Name) or base.id not in imported:
            continue
        module, name = imported[base.id]
        for where, ancestor in vllm.ancestors(module, name):
            theirs = {child.name for child in ancestor.body if isinstance(child, Function)}
            found |= {f"{where}:{ancestor.name}.{method}" for method in ours & theirs}
    return found


def write_table() -> None:
    """Describe every symbol as the installed vLLM has it."""
    vllm = Sources(installed())
    table = {symbol: vllm.describe(symbol) for symbol in sorted(uses(vllm))}
    if missing := [symbol for symbol, found in table.items() if found is None]:
        sys.exit(f"the installed vLLM does not have {', '.join(missing)}")
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    write_table()
