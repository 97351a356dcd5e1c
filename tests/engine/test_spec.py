"""The KV cache spec: it brings its block manager along, into whatever process it reaches."""

import pickle
import subprocess
import sys

import torch

from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.layout.schedule import EvictionSchedule

UNPICKLE = """
import pickle, sys
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
loaded = [name for name in sys.modules if name.startswith("vase_vllm.engine")]
assert not loaded, loaded
spec = pickle.loads(sys.stdin.buffer.read())
print(spec.num_state_blocks, KVCacheSpecRegistry.get_manager_class(spec).__name__)
"""


def test_a_process_that_only_unpickles_a_spec_has_its_manager():
    spec = EvictionSpec(
        block_size=16,
        num_kv_heads=2,
        head_size=64,
        dtype=torch.bfloat16,
        schedule=EvictionSchedule(128, 16),
        num_state_blocks=3,
    )
    result = subprocess.run(
        [sys.executable, "-c", UNPICKLE], input=pickle.dumps(spec), capture_output=True
    )
    assert result.stdout.decode().split() == ["3", "EvictionManager"], result.stderr.decode()
