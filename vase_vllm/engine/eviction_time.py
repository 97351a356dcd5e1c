"""How long the evictions of a step took, on its way from a worker to the scheduler.

Only a CPU's worker says: on a GPU the host goes on while the device evicts. A step's output has no
room for a plugin's numbers. One of its fields takes what a KV connector has measured, and is empty
without a connector, which eviction does not support.
"""

from dataclasses import replace

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

_MICROSECONDS = "vase_vllm:eviction_microseconds"


def put_microseconds(output: ModelRunnerOutput, microseconds: int) -> ModelRunnerOutput:
    """The output of a step with evictions, which says how long they took."""
    stats = KVConnectorStats({_MICROSECONDS: microseconds})
    # Steps without an output of their own share one object.
    return replace(output, kv_connector_output=KVConnectorOutput(kv_connector_stats=stats))


def take_microseconds(output: ModelRunnerOutput) -> int:
    """Take it out again, before vLLM's scheduler sees it; 0 for a step without evictions."""
    sent = output.kv_connector_output
    if sent is None or sent.kv_connector_stats is None:
        return 0
    output.kv_connector_output = None
    microseconds: int = sent.kv_connector_stats.data[_MICROSECONDS]
    return microseconds
