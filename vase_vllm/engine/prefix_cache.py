"""Prefix caching beside eviction: where prompts are evicted from, the cache holds copies.

Evictions write into a sequence's blocks in place, so no block that they reach may be shared.
Instead a prompt's blocks, once computed, are copied into blocks that belong to nobody and that
vLLM's block pool finds by their hash; a later prompt that begins alike gets copies of those.
vLLM's scheduler can already tell the workers to copy blocks before a step (its copy-on-write of
partial prefix hits), and evictions run after that: the workers need to know nothing of this.

Memory is what it is without: a sequence never holds more than its own static number of blocks, and
cached copies lie in blocks that count as free.
"""

from collections.abc import Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.request import Request

BlockPair = tuple[KVCacheBlock, KVCacheBlock]


class BlockCopies:
    """Copies of blocks that the workers make before their next step."""

    def __init__(self, block_pool: BlockPool) -> None:
        self._block_pool = block_pool
        self._pairs: list[BlockPair] = []
        # Block id of a pending destination -> the block that it is copied from.
        self._sources: dict[int, KVCacheBlock] = {}

    def add(self, source: KVCacheBlock, destination: KVCacheBlock) -> None:
        """Copy one block to another; both stay allocated until the scheduler has seen it run.

        The copies of a step run at once: what is a destination itself cannot be read yet, and its
        own source is copied instead.
        """
        source = self._sources.get(source.block_id, source)
        self._block_pool.touch((source, destination))
        self._sources[destination.block_id] = source
        self._pairs.append((source, destination))

    def take(self) -> list[BlockPair]:
        """The pending copies, which are then forgotten; the caller releases both ends of each.

        Last blocks first: in that order they are released, and a prefix must lose its end before
        its beginning, without which the rest is never found.
        """
        pairs = self._pairs[::-1]
        self._pairs.clear()
        self._sources.clear()
        return pairs


class PrefixCache:
    """What one KV cache group puts into the prefix cache, and takes out of it.

    Args:
        group: index of the KV cache group.
        block_size: token slots of a block.
    """

    def __init__(self, block_pool: BlockPool, group: int, block_size: int) -> None:
        self.copies = BlockCopies(block_pool)
        self._block_pool = block_pool
        self._group = group
        self._block_size = block_size
        self._hits: dict[str, list[KVCacheBlock]] = {}
        # Ids of the blocks in the cache that this step will compute.
        self._to_compute: set[int] = set()

    def hold(self, request_id: str, blocks: list[KVCacheBlock]) -> None:
        """Keep the cached blocks that a prompt begins with until its own blocks are there."""
        self._block_pool.touch(blocks)
        self._hits[request_id] = blocks

    def held(self, request_id: str) -> list[KVCacheBlock]:
        """The cached blocks that are held for a request."""
        return self._hits.get(request_id, [])

    def restore(self, request_id: str, own: list[KVCacheBlock], num_shared: int) -> None:
        """Copy what is held for a request into its own first blocks.

        Args:
            own: the sequence's token blocks, of which the first ``num_shared`` are the held ones.
        """
        held = self._hits.pop(request_id, [])
        for source, destination in list(zip(held, own, strict=False))[num_shared:]:
            self.copies.add(source, destination)
        self._block_pool.free_blocks(held[num_shared:])

    def publish_own(self, request: Request, own: list[KVCacheBlock], start: int, stop: int) -> None:
        """Put the blocks of a kept prompt into the cache, which this step will compute.

        Args:
            own: the sequence's token blocks, those from ``start`` to ``stop`` are put there.
        """
        self._to_compute |= {block.block_id for block in own[start:stop]}
        self._block_pool.cache_full_blocks(request, own, start, stop, self._block_size, self._group)

    def num_computed(self, blocks: Sequence[KVCacheBlock]) -> int:
        """How many of cached blocks can be copied before this step, up to the first that cannot."""
        for index, block in enumerate(blocks):
            if block.block_id in self._to_compute:
                return index
        return len(blocks)

    def withdraw(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Take what will not be computed after all out of the cache: its sequence is preempted."""
        withdrawn = self._to_compute.intersection(block.block_id for block in blocks)
        self._block_pool.evict_blocks(withdrawn)
        self._to_compute -= withdrawn

    def start_step(self) -> None:
        """The workers compute what has been scheduled."""
        self._to_compute.clear()

    def publish(
        self, request: Request, own: list[KVCacheBlock], start: int, stop: int, num_spare: int
    ) -> None:
        """Put copies of a prompt's blocks into the cache, as far as nobody else has.

        Args:
            own: the sequence's token blocks; those from ``start`` to ``stop`` are computed.
            num_spare: free blocks that nobody is waiting for. If they do not do, nothing is cached.
        """
        hashes = resolve_block_hashes(
            request.block_hashes, self._block_pool.hash_block_size, self._block_size
        )
        missing = [
            index
            for index in range(start, stop)
            if self._block_pool.get_cached_block(hashes[index], [self._group]) is None
        ]
        if not missing or len(missing) > num_spare:
            return
        copies = self._block_pool.get_new_blocks(len(missing))
        # The pool takes a whole sequence, and passes over null blocks.
        blocks = [self._block_pool.null_block] * stop
        for index, copy in zip(missing, copies, strict=True):
            blocks[index] = copy
            self.copies.add(own[index], copy)
        self._block_pool.cache_full_blocks(
            request, blocks, start, stop, self._block_size, self._group
        )
        self._block_pool.free_blocks(copies)
