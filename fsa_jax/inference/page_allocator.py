"""Assigns the pages of a cache to sequences, on the host."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fsa_jax.inference.kv_cache import KVCache, is_known


class OutOfPages(RuntimeError):
    """There are not enough free pages for a sequence; the allocator and cache are unchanged."""


class PageAllocator:
    """Assigns the pages of a cache to sequences, on the host and without moving memory.

    The cache is never modified: `reserve` and `release` return a new one with another page table.
    From then on they accept only that cache and its successors from model calls, and refuse all
    others, so that each page has one owner. A sequence never reads what its pages held before; it
    sees only what it has written itself.

    Args:
      cache: an empty cache that was made with `num_pages`.

    Raises:
      ValueError: the argument is not a cache, or some of its pages are in use.

    Example:
      >>> from fsa_jax import NSACache, NSAConfig
      >>> options = dict(config=NSAConfig(), num_kv_heads=1, head_dim=8, num_pages=3)
      >>> cache = NSACache.init(2, 128, **options)
      >>> allocator = PageAllocator(cache)
      >>> cache = allocator.reserve(cache, 0, 100)
      >>> allocator.free_pages, cache.room.tolist()
      (1, [128, 0])
      >>> allocator.reserve(cache, 1, 100)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      fsa_jax...OutOfPages: sequence 1 needs 2 more pages for 100 tokens, 1 of 3 are free
      >>> allocator.free_pages, allocator.release(cache, 0).room.tolist()
      (1, [0, 0])
    """

    def __init__(self, cache: KVCache):
        table = _table(cache)
        if table.max() >= 0:
            raise ValueError("cache must be made with num_pages, and be empty: it has pages in use")
        self.num_pages = cache.key.shape[0] // cache.layers
        self._page_size = cache.page_size
        self._free = tuple(range(self.num_pages))[::-1]  # the lowest page number is assigned first
        self._table = table  # never modified, since a jax array may share its memory

    @property
    def free_pages(self) -> int:
        """The number of pages that no sequence holds."""
        return len(self._free)

    def reserve[Cache: KVCache](self, cache: Cache, row: int, length: int) -> Cache:
        """The cache with pages for `length` tokens of sequence `row`, including its present ones.

        The call reads the page table, and so waits for the call that computes `cache`. It is better
        to reserve pages for many tokens at once than for one token at a time.

        Raises:
          ValueError: there is no such sequence, or `length` exceeds the capacity; or the pages of
            `cache` are not those that this allocator assigned last, since the cache belongs to
            another allocator or precedes a later `reserve` or `release`.
          OutOfPages: too few pages are free; the allocator is unchanged.
        """
        row = self._row(cache, row)
        pages = self._pages(row)
        wanted = -(-_within("length", length, cache.capacity) // cache.page_size)
        missing = wanted - len(pages)
        if missing <= 0:
            return cache
        if missing > len(self._free):
            raise OutOfPages(
                f"sequence {row} needs {missing} more pages for {length} tokens, "
                f"{len(self._free)} of {self.num_pages} are free"
            )
        kept = len(self._free) - missing
        return self._handed_out(cache, row, (*pages, *self._free[kept:][::-1]), self._free[:kept])

    def release[Cache: KVCache](self, cache: Cache, row: int) -> Cache:
        """The cache with sequence `row` emptied and its pages freed.

        Raises:
          ValueError: there is no such sequence, or the pages of `cache` are not those that this
            allocator assigned last; see `reserve`.
        """
        row = self._row(cache, row)
        rows = jnp.arange(self._table.shape[0], dtype=jnp.int32) == row
        free = (*self._free, *sorted(self._pages(row), reverse=True))
        return self._handed_out(cache.emptied(rows), row, (), free)

    def _row(self, cache: KVCache, row: int) -> int:
        """Checks the number of a sequence, and that the cache has the pages of this allocator."""
        table, pages = _table(cache), cache.key.shape[0] // cache.layers
        row = _within("row", row, self._table.shape[0] - 1)
        sizes = {"sequences": len(table), "num_pages": pages, "page_size": cache.page_size}
        own = {"num_pages": self.num_pages, "page_size": self._page_size}
        for name, size in ({"sequences": len(self._table)} | own).items():
            if sizes[name] != size:
                raise ValueError(f"cache must have {name}={size}, got {name}={sizes[name]}")
        for other in np.flatnonzero(np.any(table != self._table, axis=1)).tolist():
            raise ValueError(
                f"cache must have the pages that this allocator handed out last, "
                f"{self._pages(other)} for sequence {other}, got {_pages(table[other])}: it is "
                "another allocator's, or from before a later reserve or release"
            )
        return row

    def _pages(self, row: int) -> list[int]:
        return _pages(self._table[row])

    def _handed_out[Cache: KVCache](
        self, cache: Cache, row: int, pages: Sequence[int], free: tuple[int, ...]
    ) -> Cache:
        """The cache with new pages for a sequence; an error leaves the allocator unchanged."""
        table = self._table.copy()
        table[row] = -1
        table[row, : len(pages)] = pages
        new = jax.device_put(table, cache.page_table.sharding)
        cache = dataclasses.replace(cache, page_table=new)
        self._table, self._free = table, free
        return cache


def _table(cache: KVCache) -> np.ndarray:
    """The page table of a cache, on the host."""
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache must be what init_cache gives, got {type(cache).__name__}")
    is_known(*jax.tree.leaves(cache))  # raises for a donated cache
    if isinstance(cache.page_table, Tracer):
        raise ValueError("cache must not be traced, as inside jit: the host hands out pages")
    return np.asarray(cache.page_table)


def _pages(row: np.ndarray) -> list[int]:
    return row[row >= 0].tolist()


def _within(name: str, value: int, most: int) -> int:
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or not 0 <= value <= most:
        kind = "" if integer else "an integer "
        raise ValueError(f"{name} must be {kind}in 0 .. {most}, got {value!r}")
    return int(value)
