"""KV cache spec of the layers that evict: what vLLM's memory accounting knows of a sequence."""

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.block_table_row import BlockTableRow
from vase_vllm.layout.schedule import EvictionSchedule


@dataclass(frozen=True, kw_only=True)
class EvictionSpec(FullAttentionSpec):
    """KV cache of a full-attention layer whose sequences hold a static number of blocks.

    Attributes:
        schedule: budget and window of every sequence.
        num_state_blocks: blocks of a sequence that hold its query ring, and what its policy keeps
            of each token.
    """

    schedule: EvictionSchedule
    num_state_blocks: int

    def num_blocks(self, num_slots: int) -> int:
        """Blocks of a sequence with this many token slots, its state blocks included."""
        return self.num_state_blocks + cdiv(num_slots, self.block_size)

    def num_row_blocks(self, num_tokens: int, first: int) -> int:
        """Entries of a sequence's row behind the header, when it has ``num_tokens`` tokens."""
        return self.schedule.num_row_blocks(
            num_tokens, first, self.block_size, self.num_state_blocks
        )

    def num_tokens_of_row(self, num_blocks: int, first: int) -> int:
        """Most tokens for which a row with ``num_blocks`` entries behind the header suffices."""
        return self.schedule.num_tokens_of_row(
            num_blocks, first, self.block_size, self.num_state_blocks
        )

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one sequence: vLLM's start-up check and "Maximum concurrency" count this."""
        num_slots = min(self.schedule.bound, vllm_config.model_config.max_model_len)
        return self.num_blocks(num_slots) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Width of a block-table row; the worker indexes it by position before we remap."""
        # A sequence that keeps a query evicts at most a window later.
        longest = max_len + self.schedule.window
        num_token_blocks = super().max_num_blocks_per_req(vllm_config, longest)
        return BlockTableRow.NUM_HEADER + num_token_blocks + self.num_state_blocks

    @classmethod
    def merge(cls, specs: list["EvictionSpec"]) -> "EvictionSpec":
        """One spec for a group of layers, which must agree in everything."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("All layers in the same KV cache group must be the same.")
        return specs[0]
