"""What runs in the scheduler's process: when a request is admitted, and which blocks it holds.

Importing this package registers the block manager of :class:`EvictionSpec` with vLLM. Workers send
their specs to the scheduler's process as pickles; unpickling one imports this package, so that no
process can hold a spec without its manager.
"""

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from vase_vllm.engine.block_manager import EvictionManager
from vase_vllm.engine.spec import EvictionSpec

# Outside of the scheduler's process vLLM registers its own specs at the first question to the
# registry, and only if it is empty then: ask before ours is in it.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})
register_kv_cache_spec(manager_class=EvictionManager)(EvictionSpec)
