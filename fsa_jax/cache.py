"""Caches of keys and values for inference: pages, a page table, and lengths.

Keys and values stand in pages of `page_size` tokens. A sequence has a list of pages, its row of the
page table; token t of it is in place t % page_size of page number t // page_size. So sequences come
and go without a move of memory, and a cache whose pages follow one another is the special case that
`init` makes unless it is given a number of pages.

Pages of all layers stand in one array, layer after layer: a scan over layers carries that array and
writes into it in place, and a layer reads it through the page table plus its first page.

Shapes: B sequences, J pages that a sequence may have, P pages of all layers, p tokens of a page, K
key/value heads, D and E head widths, L layers, n tokens of a chunk, l kernel_size, d kernel_stride.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from fsa_jax import checks
from fsa_jax.config import NSAConfig

_STATIC: Any = {"static": True}


class OutOfPages(RuntimeError):
    """There are not enough free pages for a sequence; nothing has been changed."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Where the tokens of a call stand in their sequences.

    Attributes:
      position: int32 [B, n], positions in the sequences.
      valid: bool [B, n], tokens that are there: the first few of each row.
    """

    position: Int[Array, "B n"]
    valid: Bool[Array, "B n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of full attention.

    Attributes:
      key: [P, p, K, D], after RoPE.
      value: [P, p, K, E].
      page_table: int32 [B, J], pages of each sequence in the order of its tokens, then -1.
      lengths: int32 [B], tokens of each sequence.
      layers: L; P is L times the number of pages that a layer has.
    """

    key: Float[Array, "P p K D"]
    value: Float[Array, "P p K E"]
    page_table: Int[Array, "B J"]
    lengths: Int[Array, " B"]
    layers: int = dataclasses.field(metadata=_STATIC)

    @classmethod
    def init(
        cls,
        batch: int,
        capacity: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any = jnp.float32,
        page_size: int = 64,
        num_pages: int | None = None,
        layers: int = 1,
    ) -> Self:
        """An empty cache; a layer's or a model's `init_cache` gives the sizes by itself.

        Args:
          batch: sequences B.
          capacity: tokens that a sequence may have; rounded up to whole pages.
          num_kv_heads: K.
          head_dim: D and E.
          dtype: of keys and values.
          page_size: tokens of a page.
          num_pages: pages of a layer, which a `PageAllocator` hands out; None: every sequence has
            its pages from the start.
          layers: L.

        Raises:
          ValueError: a size is not a positive integer.
        """
        places = _init_places(batch, capacity, page_size, num_pages)
        pages = layers * places.pop("pages")
        shape = (pages, page_size, num_kv_heads, head_dim)
        return cls(
            key=jnp.zeros(shape, dtype), value=jnp.zeros(shape, dtype), layers=layers, **places
        )

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have."""
        return self.page_table.shape[1] * self.page_size

    @property
    def room(self) -> Int[Array, " B"]:
        """Tokens that each sequence has pages for, those it holds included."""
        return jnp.sum(self.page_table >= 0, axis=1, dtype=jnp.int32) * self.page_size

    def place(self, length: int, num_tokens: Array | None = None) -> Chunk:
        """Where the next `length` tokens of each sequence stand.

        Args:
          length: tokens n of a row of the call.
          num_tokens: int32 [B], how many of them are there; None: all.

        Raises:
          ValueError: a shape does not fit; or, where the numbers are known, that is outside jit, a
            number is not in 0 .. n or a sequence has no room. Inside jit such tokens count as
            padding: they are not stored, and their results are 0.
        """
        batch = self.page_table.shape[0]
        if num_tokens is None:
            num_tokens = jnp.full((batch,), length, jnp.int32)
        num_tokens = checks.integers("num_tokens", num_tokens, "B")
        if num_tokens.shape != (batch,):
            raise ValueError(
                f"num_tokens must have one number for each of the {batch} sequences of the cache, "
                f"got shape {num_tokens.shape}"
            )
        self._check_room(length, num_tokens)
        token = jnp.arange(length, dtype=jnp.int32)[None]
        position = self.lengths[:, None] + token
        valid = (token < num_tokens[:, None]) & (position < self.room[:, None])
        return Chunk(position, valid)

    def _check_room(self, length: int, num_tokens: Array) -> None:
        known = (num_tokens, self.lengths, self.page_table)
        if any(isinstance(x, Tracer) or not x.is_fully_addressable for x in known):
            return
        counts, lengths, table = (np.asarray(x) for x in known)
        if counts.min() < 0 or counts.max() > length:
            raise ValueError(f"num_tokens must be in 0 .. {length}, got {counts.tolist()}")
        room = (table >= 0).sum(axis=1) * self.page_size
        for row in np.flatnonzero((lengths + counts > room) & (counts > 0)):
            raise ValueError(
                f"the cache has room for {room[row]} tokens of sequence {row}, which holds "
                f"{lengths[row]} and would get {counts[row]} more"
            )

    def advance(self, chunk: Chunk) -> Self:
        """The cache with the lengths after `chunk` has been written in every layer."""
        added = jnp.sum(chunk.valid, axis=1, dtype=jnp.int32)
        return dataclasses.replace(self, lengths=self.lengths + added)

    def first_page(self, layer: int | Array) -> int | Array:
        """Where the pages of a layer start."""
        return layer * (self.key.shape[0] // self.layers)

    def pages(self, layer: int | Array) -> Int[Array, "B J"]:
        """The page table of a layer; pages that are not there are those of some other sequence."""
        return jnp.maximum(self.page_table, 0) + self.first_page(layer)

    def write(
        self, pool: Float[Array, "P p K W"], x: Float[Array, "B m K W"], layer, place, valid
    ) -> Float[Array, "P p K W"]:
        """Writes entries into pages; `place` int32 [B, m] counts in the sequence."""
        size = pool.shape[1]
        number = jnp.clip(place // size, 0, self.page_table.shape[1] - 1)
        page = jnp.take_along_axis(self.page_table, number, axis=1)
        # what is not stored goes to places of its own behind the end, where it is dropped
        nowhere = pool.shape[0] + jnp.arange(place.size, dtype=jnp.int32).reshape(place.shape)
        page = jnp.where(valid & (page >= 0), page + self.first_page(layer), nowhere)
        return pool.at[page, place % size].set(x, mode="drop", unique_indices=True)

    def read(self, pool: Float[Array, "P p K W"], layer) -> Float[Array, "B J*p K W"]:
        """All entries of every sequence, a copy. Places that were not written hold anything."""
        pages = pool[self.pages(layer)]
        return pages.reshape(pages.shape[0], -1, *pool.shape[2:])

    def append(self, key: Array, value: Array, layer, chunk: Chunk) -> Self:
        """The cache with the keys and values [B, n, K, ...] of a chunk in one layer."""
        return dataclasses.replace(
            self,
            key=self.write(self.key, key, layer, chunk.position, chunk.valid),
            value=self.write(self.value, value, layer, chunk.position, chunk.valid),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NSACache(KVCache):
    """What native sparse attention keeps of its sequences. A page is a block.

    The sliding window is the end of the same pages, unless its keys have projections of their own.

    Attributes:
      key, value, page_table, lengths, layers: as in `KVCache`; keys and values of the selected
        branch, and of the window where both share them.
      window_key, window_value: [P, p, K, D] and [P, p, K, E] of the window where it has
        projections of its own, else None.
      compressed_key: [P, p / d, K, D], after RoPE; window i of a sequence stands in the page of
        its first token i * d.
      compressed_value: [P, p / d, K, E].
      tail_key: [L, B, l - 1, K, D], the last tokens of each sequence before RoPE, the newest last:
        those of windows that are not yet whole are among them.
      tail_value: [L, B, l - 1, K, E].
      config: sizes of the attention.
    """

    window_key: Float[Array, "P p K D"] | None
    window_value: Float[Array, "P p K E"] | None
    compressed_key: Float[Array, "P q K D"]
    compressed_value: Float[Array, "P q K E"]
    tail_key: Float[Array, "L B l-1 K D"]
    tail_value: Float[Array, "L B l-1 K E"]
    config: NSAConfig = dataclasses.field(metadata=_STATIC)

    @classmethod
    def init(  # type: ignore[override]
        cls,
        batch: int,
        capacity: int,
        *,
        config: NSAConfig,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any = jnp.float32,
        window_of_its_own: bool = False,
        num_pages: int | None = None,
        layers: int = 1,
    ) -> Self:
        """An empty cache; arguments as in `KVCache.init`, whose page size is the block size.

        Args:
          batch: sequences B.
          capacity: tokens that a sequence may have; rounded up to whole blocks.
          config: sizes of the attention.
          num_kv_heads: K.
          head_dim: D and E.
          dtype: of keys and values.
          window_of_its_own: whether the window has keys and values of its own.
          num_pages: see `KVCache.init`.
          layers: L.

        Raises:
          ValueError: a size is not a positive integer.

        Example:
          >>> cache = NSACache.init(2, 100, config=NSAConfig(), num_kv_heads=1, head_dim=8)
          >>> cache.key.shape, cache.compressed_key.shape, cache.capacity
          ((4, 64, 1, 8), (4, 4, 1, 8), 128)
        """
        size, stride = config.block_size, config.kernel_stride
        places = _init_places(batch, capacity, size, num_pages)
        pages = layers * places.pop("pages")

        def pool(entries: int) -> Array:
            return jnp.zeros((pages, entries, num_kv_heads, head_dim), dtype)

        def tail() -> Array:
            shape = (layers, batch, config.kernel_size - 1, num_kv_heads, head_dim)
            return jnp.zeros(shape, dtype)

        return cls(
            key=pool(size),
            value=pool(size),
            window_key=pool(size) if window_of_its_own else None,
            window_value=pool(size) if window_of_its_own else None,
            compressed_key=pool(size // stride),
            compressed_value=pool(size // stride),
            tail_key=tail(),
            tail_value=tail(),
            layers=layers,
            config=config,
            **places,
        )

    def append_window(self, key: Array, value: Array, layer, chunk: Chunk) -> Self:
        """Like `append`, for a window with keys and values of its own."""
        assert self.window_key is not None
        assert self.window_value is not None
        return dataclasses.replace(
            self,
            window_key=self.write(self.window_key, key, layer, chunk.position, chunk.valid),
            window_value=self.write(self.window_value, value, layer, chunk.position, chunk.valid),
        )

    def append_compressed(
        self, key: Array, value: Array, layer, chunk: Chunk, compress_key, compress_value
    ) -> Self:
        """The cache with the windows that a chunk completes, and the tail after it.

        Args:
          key: [B, n, K, D] before RoPE.
          value: [B, n, K, E].
          layer: number of the layer.
          chunk: where the tokens stand.
          compress_key: maps keys [B, t, K, D] of consecutive tokens and the positions [B, m] of the
            first tokens of their windows to compressed keys [B, m, K, D], m = t // d.
          compress_value: maps values likewise.
        """
        size, stride = self.config.kernel_size, self.config.kernel_stride
        count = -(-key.shape[1] // stride)  # the most windows that n tokens can complete
        before = size - 1
        oldest = chunk.position[:, 0] - before  # position of the first token at hand
        # windows end in the chunk: they start with the oldest token or after it
        first = jnp.maximum(0, -(-oldest // stride)) * stride
        length = (count - 1) * stride + size
        number = first[:, None] // stride + jnp.arange(count, dtype=jnp.int32)[None]
        added = jnp.sum(chunk.valid, axis=1, dtype=jnp.int32)
        whole = number * stride + size <= (chunk.position[:, 0] + added)[:, None]

        def tokens(tail: Array, x: Array) -> tuple[Array, Array]:
            """The tokens of the windows, and the tail after the chunk."""
            tail = jax.lax.dynamic_index_in_dim(tail, layer, keepdims=False)
            both = jnp.concatenate([tail, x], axis=1)
            # room for windows that are not whole; they are not stored
            both = jnp.pad(both, ((0, 0), (0, length), (0, 0), (0, 0)))
            take = jax.vmap(jax.lax.dynamic_slice_in_dim, (0, 0, None))
            return take(both, first - oldest, length), take(both, added, before)

        def put(tail: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(tail, new, layer, axis=0)

        key, tail_key = tokens(self.tail_key, key)
        value, tail_value = tokens(self.tail_value, value)
        key, value = compress_key(key, number * stride), compress_value(value)
        key, value = key[:, :count], value[:, :count]
        return dataclasses.replace(
            self,
            compressed_key=self.write(self.compressed_key, key, layer, number, whole),
            compressed_value=self.write(self.compressed_value, value, layer, number, whole),
            tail_key=put(self.tail_key, tail_key),
            tail_value=put(self.tail_value, tail_value),
        )


def _init_places(batch: int, capacity: int, page_size: int, num_pages: int | None) -> dict:
    """Page table and lengths of an empty cache, and the number of pages of a layer."""
    batch, capacity = checks.size("batch", batch), checks.size("capacity", capacity)
    columns = -(-capacity // checks.size("page_size", page_size))
    if num_pages is None:
        table = jnp.arange(batch * columns, dtype=jnp.int32).reshape(batch, columns)
        num_pages = batch * columns
    else:
        num_pages = checks.size("num_pages", num_pages)
        table = jnp.full((batch, columns), -1, jnp.int32)
    lengths = jnp.zeros((batch,), jnp.int32)
    return {"pages": num_pages, "page_table": table, "lengths": lengths}


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
      >>> options = dict(config=NSAConfig(), num_kv_heads=1, head_dim=8, num_pages=3)
      >>> cache = NSACache.init(2, 128, **options)
      >>> allocator = PageAllocator(cache)
      >>> cache = allocator.reserve(cache, 0, 100)
      >>> allocator.free_pages, cache.room.tolist()
      (1, [128, 0])
      >>> allocator.reserve(cache, 1, 100)
      Traceback (most recent call last):
      ...
      fsa_jax.cache.OutOfPages: sequence 1 needs 2 more pages for 100 tokens, 1 of 3 are free
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
