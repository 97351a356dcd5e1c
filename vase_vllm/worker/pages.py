"""How keys and values lie inside a page, and how to read and move them.

On a GPU a page is plain: a key and a value side by side for every token. vLLM's CPU attention
permutes each page for the instruction set at hand ("vec", "amx", ...). Every such packing is
separable: the offset of (token, dimension) in a page is a sum of one number of the token and one of
the dimension. So one probe through vLLM's own cache write finds any of them, and nothing here
depends on the instruction set.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

import torch
from vllm import _custom_ops as ops

from vase_vllm.layout.arithmetic import cdiv

At = tuple[torch.Tensor, torch.Tensor]
"""Where tokens lie: (block, token in the block), each [n] int64."""
ReadHalf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Reads the keys, or the values, of blocks of a layer's cache: see :class:`PageLayout`."""
_VALUES_TOGETHER = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Numbers in the values that are read at once, by device: 2 and 128 MiB of fp32."""


@dataclass(frozen=True)
class Packing:
    """Offsets of one of the two halves (keys or values) of a page.

    Attributes:
        tokens: [block_size] int64, the token's share of an element's offset.
        dims: [D] int64, the dimension's share.
    """

    tokens: torch.Tensor
    dims: torch.Tensor

    @cached_property
    def _has_plain_tokens(self) -> bool:
        """Tokens lie one after another, each with its dimensions in order."""
        return torch.equal(self.dims, torch.arange(len(self.dims)))

    @cached_property
    def _has_plain_dims(self) -> bool:
        """Dimensions lie one after another, each with its tokens in order."""
        return torch.equal(self.tokens, torch.arange(len(self.tokens)))

    @cached_property
    def _offsets(self) -> torch.Tensor:
        """[block_size, D] int64, the offset of every element."""
        return self.tokens[:, None] + self.dims[None, :]

    def _view(self, pages: torch.Tensor) -> torch.Tensor | None:
        """[..., block_size, D] view of packed pages where plain strides can express it."""
        num_tokens, num_dims = len(self.tokens), len(self.dims)
        if self._has_plain_tokens:
            return pages.unflatten(-1, (num_tokens, num_dims))
        if self._has_plain_dims:
            return pages.unflatten(-1, (num_dims, num_tokens)).transpose(-1, -2)
        return None

    def read(
        self, pages: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[n, H, block_size, D] of the blocks of packed pages: see :class:`PageLayout`.

        Args:
            pages: [num_blocks, H, block_size * D].
        """
        view = self._view(pages)
        if view is not None:
            # Copies runs of numbers, where ``view[blocks]`` would copy number by number.
            return torch.index_select(view, 0, blocks, out=out)
        # Block by block: several times faster than gathering the packed pages first.
        parts = [pages[block][..., self._offsets] for block in blocks.tolist()]
        return torch.stack(parts, out=out)

    def copy(
        self,
        pages: torch.Tensor,
        head: torch.Tensor,
        source: tuple[torch.Tensor, torch.Tensor],
        destination: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Copy tokens between pages; a destination may be its own source, and no other's.

        Args:
            pages: [num_blocks, H, block_size * D], written in place.
            head: [moves] int64.
            source, destination: (block, token in the block), each [moves] int64.
        """
        view = self._view(pages)
        if view is not None:
            view[destination[0], head, destination[1]] = view[source[0], head, source[1]]
            return
        columns = [self.tokens[token][:, None] + self.dims for token in (source[1], destination[1])]
        heads = head[:, None]
        moved = pages[source[0][:, None], heads, columns[0]]
        pages[destination[0][:, None], heads, columns[1]] = moved


class PageLayout(Protocol):
    """Pages of one layer. A cache is [num_blocks, H, block_size, 2 * D], however it is packed."""

    def keys(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The keys of blocks: [n, H, block_size, D] of the cache's dtype.

        Args:
            blocks: [n] int64.
            out: where to write them instead of a new tensor, in any order of strides.
        """

    def values(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values likewise."""

    def copy(self, kv_cache: torch.Tensor, head: torch.Tensor, source: At, destination: At) -> None:
        """Copy tokens between pages; a destination may be its own source, and no other's.

        Args:
            kv_cache: written in place.
            head: [moves] int64.
            source, destination: (block, token in the block), each [moves] int64.
        """


@dataclass(frozen=True)
class PlainPages:
    """Pages as GPU backends have them: ``key | value`` for every token."""

    def keys(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :class:`PageLayout`."""
        return torch.index_select(kv_cache.chunk(2, dim=-1)[0], 0, blocks, out=out)

    def values(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :class:`PageLayout`."""
        return torch.index_select(kv_cache.chunk(2, dim=-1)[1], 0, blocks, out=out)

    def copy(self, kv_cache: torch.Tensor, head: torch.Tensor, source: At, destination: At) -> None:
        """See :class:`PageLayout`."""
        kv_cache[destination[0], head, destination[1]] = kv_cache[source[0], head, source[1]]


@dataclass(frozen=True)
class PackedPages:
    """Pages of the CPU backend: all keys, then all values, each packed in its way."""

    key_packing: Packing
    value_packing: Packing

    def keys(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :class:`PageLayout`."""
        return self.key_packing.read(self._split(kv_cache)[0], blocks, out)

    def values(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :class:`PageLayout`."""
        return self.value_packing.read(self._split(kv_cache)[1], blocks, out)

    def copy(self, kv_cache: torch.Tensor, head: torch.Tensor, source: At, destination: At) -> None:
        """See :class:`PageLayout`."""
        keys, values = self._split(kv_cache)
        self.key_packing.copy(keys, head, source, destination)
        self.value_packing.copy(values, head, source, destination)

    @staticmethod
    def _split(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed keys and packed values of a cache, each [num_blocks, H, block_size * D] views."""
        keys, values = kv_cache.flatten(2).chunk(2, dim=-1)
        return keys, values


@dataclass(frozen=True)
class CandidatePages:
    """A sequence's candidates in its pages: a ``TokenSource`` of the policies.

    H is the number of KV heads of all the layers together, layer by layer.

    Attributes:
        kv_caches: of the layers, alike in shape.
        blocks: [blocks] int64, of the sequence's slots.
        num: candidates, the first slots.
        window: newest tokens, the slots after them.
    """

    layout: PageLayout
    kv_caches: Sequence[torch.Tensor]
    blocks: torch.Tensor
    num: int
    window: int

    def keys(self) -> torch.Tensor:
        """[H, D, n] fp32, after RoPE."""
        blocks = self._candidate_blocks
        keys = self._empty(self._head_size, len(blocks) * self._block_size)
        by_block = keys.unflatten(-1, (len(blocks), -1)).permute(0, 3, 1, 4, 2)
        for kv_cache, of_layer in zip(self.kv_caches, by_block, strict=True):
            self.layout.keys(kv_cache, blocks, of_layer)
        return keys.flatten(0, 1)[..., : self.num].float()

    def values(self) -> Iterator[torch.Tensor]:
        """[H, m, D] of the cache's dtype, part by part."""
        num_heads = len(self.kv_caches) * self.kv_caches[0].shape[1]
        num_together = _VALUES_TOGETHER[self.blocks.device.type] // (num_heads * self._head_size)
        left = self.num
        for blocks in self._candidate_blocks.split(max(1, num_together // self._block_size)):
            part = self._tokens(self.layout.values, blocks)[:, :left]
            left -= part.shape[1]
            yield part

    def window_keys(self) -> torch.Tensor:
        """[H, W, D] of the cache's dtype, after RoPE."""
        return self._of_window(self.layout.keys)

    def window_values(self) -> torch.Tensor:
        """[H, W, D] of the cache's dtype."""
        return self._of_window(self.layout.values)

    @property
    def _block_size(self) -> int:
        return self.kv_caches[0].shape[2]

    @property
    def _head_size(self) -> int:
        return self.kv_caches[0].shape[3] // 2

    @property
    def _candidate_blocks(self) -> torch.Tensor:
        return self.blocks[: cdiv(self.num, self._block_size)]

    def _of_window(self, read: ReadHalf) -> torch.Tensor:
        first_block, start = divmod(self.num, self._block_size)
        return self._tokens(read, self.blocks[first_block:])[:, start : start + self.window]

    def _tokens(self, read: ReadHalf, blocks: torch.Tensor) -> torch.Tensor:
        """[H, m, D] of the cache's dtype: all tokens of blocks."""
        tokens = self._empty(len(blocks) * self._block_size, self._head_size)
        by_block = tokens.unflatten(2, (len(blocks), -1)).transpose(1, 2)
        for kv_cache, of_layer in zip(self.kv_caches, by_block, strict=True):
            read(kv_cache, blocks, of_layer)
        return tokens.flatten(0, 1)

    def _empty(self, rows: int, columns: int) -> torch.Tensor:
        """[layers, heads of a layer, rows, columns] of the cache's dtype."""
        num_heads = self.kv_caches[0].shape[1]
        return self.kv_caches[0].new_empty(len(self.kv_caches), num_heads, rows, columns)


@cache
def cpu_page_layout(isa: str, block_size: int, head_size: int, dtype: torch.dtype) -> PackedPages:
    """Find the packing of vLLM's CPU backend by writing known numbers through its own cache write.

    Args:
        isa: instruction set that the backend chose for the layer.

    Raises:
        NotImplementedError: the packing is not separable.
    """
    tokens = torch.arange(block_size)[:, None, None].expand(-1, 1, head_size)
    dims = torch.arange(head_size)[None, None, :].expand(block_size, 1, -1)
    halves = []
    for token_of, dim_of in zip(
        _written(isa, tokens, dtype), _written(isa, dims, dtype), strict=True
    ):
        offsets = torch.empty(block_size, head_size, dtype=torch.int64)
        offsets[token_of, dim_of] = torch.arange(block_size * head_size)
        packing = Packing(tokens=offsets[:, 0] - offsets[0, 0], dims=offsets[0])
        if not torch.equal(packing.tokens[:, None] + packing.dims[None, :], offsets):
            raise NotImplementedError(
                f"--kv-eviction: the page packing {isa!r} of the CPU backend is unknown; "
                "remove --kv-eviction"
            )
        halves.append(packing)
    return PackedPages(*halves)


def _written(isa: str, numbers: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Where the cache write puts numbers: for keys and values, the number at each offset.

    Args:
        numbers: [block_size, 1, D] int64, below 2**14. They are written in two parts of 7 bits,
            which every dtype represents.
    """
    block_size, _, head_size = numbers.shape
    found = [torch.zeros(block_size * head_size, dtype=torch.int64) for _ in range(2)]
    for shift in (0, 7):
        part = (numbers >> shift & 0x7F).to(dtype).contiguous()
        page = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
        key_cache, value_cache = page.chunk(2, dim=2)
        slots = torch.arange(block_size)
        ops.cpu_attn_reshape_and_cache(part, part, key_cache, value_cache, slots, isa)
        for half, packed in zip(found, page.flatten().chunk(2), strict=True):
            half += packed.long() << shift
    return tuple(found)
