"""The headers of the sequences' rows on the host, without asking the device.

On a GPU the block table, with the header that says when a sequence evicts, is in device memory.
The scheduler's messages carry the same header when a request is admitted; this remembers it.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.attention.backend import CommonAttentionMetadata

from vase_vllm.layout.block_table_row import BlockTableRow, RowHeader

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

_PADDING = (0,) * BlockTableRow.NUM_HEADER


class RowHeaders:
    """The header of every running request's row.

    Attributes:
        by_request: request id to the header.

    Args:
        runner: vLLM's model runner, V1 or V2; tells which request is in which row.
        max_num_requests: running requests at most.
    """

    def __init__(self, runner: Any, max_num_requests: int) -> None:
        self._runner = runner
        self.by_request: dict[str, RowHeader] = {}
        self._by_index = np.zeros((max_num_requests, BlockTableRow.NUM_HEADER), dtype=np.int64)
        self._not_indexed: list[str] = []

    def observe(self, scheduler_output: "SchedulerOutput", group: int) -> None:
        """Learn from the scheduler's message, before the step that it starts.

        Args:
            group: KV cache group whose rows have a header.
        """
        for request_id in scheduler_output.finished_req_ids:
            self.by_request.pop(request_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            header = RowHeader(*request.block_ids[group][: BlockTableRow.NUM_HEADER])
            self.by_request[request.req_id] = header
            self._not_indexed.append(request.req_id)

    def of_rows(self, common: CommonAttentionMetadata) -> np.ndarray:
        """[num_reqs, columns of a header] int64; zeros in padding rows."""
        result = np.zeros((common.num_reqs, BlockTableRow.NUM_HEADER), dtype=np.int64)
        if common.req_idx is not None:
            # Runner V2 numbers its requests, and they keep their number while they run.
            for request_id in self._not_indexed:
                index = self._runner.req_states.req_id_to_index[request_id]
                self._by_index[index] = self.by_request[request_id]
            rows = self._by_index[common.req_idx[: common.num_reqs]]
            result[: len(rows)] = rows
        else:
            # Runner V1 moves requests between rows at any time.
            request_ids = self._runner.input_batch.req_ids[: common.num_reqs]
            for index, request_id in enumerate(request_ids):
                result[index] = self.by_request.get(request_id, _PADDING)
        self._not_indexed.clear()
        return result
