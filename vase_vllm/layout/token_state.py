"""Where the numbers lie that a policy keeps of each token, in blocks behind the query ring's.

A policy may carry numbers with a token from one eviction to the next, such as the attention that it
has received so far. They are fp32, and exist of the tokens that an eviction leaves: one row of
``budget`` numbers after the other, in slot order and without the slots of a kept prompt, through
the pages of each KV head like text through lines. Their bits may be NaN in the cache's dtype; when
another sequence gets the block, attention masks them like anything behind that sequence's length.
"""

from dataclasses import dataclass

from vase_vllm.layout.arithmetic import cdiv

NUMBER_BYTES = 4


@dataclass(frozen=True)
class TokenStateLayout:
    """Where a policy's numbers lie in state blocks.

    Two numbers of each of 4096 tokens of Qwen3-8B in bf16:

    >>> TokenStateLayout(num_numbers=2, budget=4096, block_size=16, cell_bytes=512).num_blocks
    4

    Attributes:
        num_numbers: that the policy keeps of a token; 0 if none.
        budget: tokens that a sequence holds right after an eviction, beside a kept prompt.
        block_size: token slots of a block.
        cell_bytes: of a key and a value of one KV head.
    """

    num_numbers: int
    budget: int
    block_size: int
    cell_bytes: int

    @property
    def num_blocks(self) -> int:
        """State blocks of a sequence."""
        num_bytes = self.num_numbers * self.budget * NUMBER_BYTES
        return cdiv(num_bytes, self.block_size * self.cell_bytes)
