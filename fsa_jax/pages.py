"""Pages of a cache, handed out on the host to sequences that come and go."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax import Array

from fsa_jax.cache import KVCache


class OutOfPages(RuntimeError):
    """There are not enough free pages for a sequence; nothing has been changed."""


class PageAllocator:
    """Hands out the pages of a cache, on the host: sequences come and go, no memory is moved.

    The cache itself is never changed: `reserve` and `release` return a new one whose page table
    differs. What a page held before is never read by its next sequence, which sees only what it
    has written itself.

    Args:
      cache: an empty cache that was made with `num_pages`.

    Raises:
      ValueError: the cache has pages in use.

    Example:
      >>> from fsa_jax import NSACache, NSAConfig
      >>> options = dict(config=NSAConfig(), num_kv_heads=1, head_dim=8, num_pages=3)
      >>> cache = NSACache.init(2, 128, **options)
      >>> allocator = PageAllocator(cache)
      >>> cache = allocator.reserve(cache, 0, 100)
      >>> allocator.free_pages, cache.room.tolist()
      (1, [128, 0])
      >>> allocator.reserve(cache, 1, 100)
      Traceback (most recent call last):
      ...
      fsa_jax.pages.OutOfPages: sequence 1 needs 2 more pages for 100 tokens, 1 of 3 are free
      >>> allocator.free_pages, allocator.release(cache, 0).room.tolist()
      (1, [0, 0])
    """

    def __init__(self, cache: KVCache):
        if np.asarray(cache.page_table).max() >= 0:
            raise ValueError("cache must be made with num_pages, and be empty: it has pages in use")
        self.num_pages = cache.key.shape[0] // cache.layers
        self._free = list(range(self.num_pages))[::-1]  # the lowest number goes first
        self._pages: list[list[int]] = [[] for _ in range(cache.page_table.shape[0])]

    @property
    def free_pages(self) -> int:
        """Number of pages that no sequence has."""
        return len(self._free)

    def reserve[Cache: KVCache](self, cache: Cache, row: int, length: int) -> Cache:
        """The cache with pages for `length` tokens of sequence `row`, those it holds included.

        Raises:
          ValueError: there is no such sequence, or it may not have so many tokens.
          OutOfPages: too few pages are free; the allocator is as it was.
        """
        pages = self._of(row)
        if not 0 <= length <= cache.capacity:
            raise ValueError(f"length must be in 0 .. {cache.capacity}, got {length}")
        missing = -(-length // cache.page_size) - len(pages)
        if missing <= 0:
            return cache
        if missing > len(self._free):
            raise OutOfPages(
                f"sequence {row} needs {missing} more pages for {length} tokens, "
                f"{len(self._free)} of {self.num_pages} are free"
            )
        pages += [self._free.pop() for _ in range(missing)]
        return dataclasses.replace(cache, page_table=_set_row(cache.page_table, row, pages))

    def release[Cache: KVCache](self, cache: Cache, row: int) -> Cache:
        """The cache without sequence `row`, whose pages become free and whose length 0.

        Raises:
          ValueError: there is no such sequence.
        """
        pages = self._of(row)
        self._free += sorted(pages, reverse=True)
        pages.clear()
        return dataclasses.replace(
            cache,
            page_table=_set_row(cache.page_table, row, pages),
            lengths=cache.lengths.at[row].set(0),
        )

    def _of(self, row: int) -> list[int]:
        if not 0 <= row < len(self._pages):
            raise ValueError(f"row must be in 0 .. {len(self._pages) - 1}, got {row}")
        return self._pages[row]


def _set_row(table: Array, row: int, pages: Sequence[int]) -> Array:
    new = np.full(table.shape[1], -1, np.int32)
    new[: len(pages)] = pages
    return table.at[row].set(new)
