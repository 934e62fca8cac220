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
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from fsa_jax import checks
from fsa_jax.config import NSAConfig

_STATIC: Any = {"static": True}


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

    @property
    def first(self) -> Int[Array, " B"]:
        """Tokens of each sequence before the call."""
        return self.position[:, 0]

    @property
    def stop(self) -> Int[Array, " B"]:
        """Tokens of each sequence after the call."""
        return self.first + jnp.sum(self.valid, axis=1, dtype=jnp.int32)


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

    def emptied(self) -> Self:
        """The cache without any token of any sequence; they keep their pages."""
        return dataclasses.replace(self, lengths=jnp.zeros_like(self.lengths))

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
        if num_tokens is None:
            num_tokens = jnp.full(self.lengths.shape, length, jnp.int32)
        num_tokens = self._numbers("num_tokens", num_tokens)
        self._check_room(length, num_tokens)
        token = jnp.arange(length, dtype=jnp.int32)[None]
        position = self.lengths[:, None] + token
        valid = (token < num_tokens[:, None]) & (position < self.room[:, None])
        return Chunk(position, valid)

    def _check_room(self, length: int, num_tokens: Array) -> None:
        known = (num_tokens, self.lengths, self.page_table)
        if not _known(*known):
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
        return dataclasses.replace(self, lengths=chunk.stop)

    def rewind(self, count: Int[Array, " B"]) -> Self:
        """The cache without the last `count` tokens of each sequence, for drafts that were wrong.

        Args:
          count: int32 [B], tokens that each sequence loses; in an `NSACache` at most `rollback`
            since the last token that was added, which inside jit cannot be checked.

        Raises:
          ValueError: a shape does not fit; or, outside jit, a number is too large or negative.
        """
        count = self._numbers("count", count)
        if _known(count, self.lengths):
            lengths, counts = np.asarray(self.lengths), np.asarray(count)
            most = np.minimum(lengths, lengths if self._rollback is None else self._rollback)
            if (counts < 0).any() or (counts > most).any():
                raise ValueError(
                    f"count must be in 0 .. {most.tolist()} (rollback={self._rollback}, "
                    f"lengths={lengths.tolist()}), got {counts.tolist()}"
                )
        return dataclasses.replace(self, lengths=jnp.maximum(self.lengths - count, 0))

    @property
    def _rollback(self) -> int | None:
        """The most tokens that `rewind` may take back; None: all."""
        return None

    def _numbers(self, name: str, x: Array) -> Array:
        """`x` checked: one number for each sequence."""
        x = checks.integers(name, x, "B")
        if x.shape != self.lengths.shape:
            raise ValueError(
                f"{name} must have one number for each of the {self.lengths.shape[0]} sequences "
                f"of the cache, got shape {x.shape}"
            )
        return x

    def traits(self) -> dict[str, Any]:
        """What a layer's cache must have, by name."""
        kv_heads, width = self.key.shape[2:]
        return {
            "kind": type(self).__name__,
            "num_kv_heads": kv_heads,
            "head_dim": width,
            "layers": self.layers,
            "sequences": self.lengths.shape[0],
        }

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
        new = pool.at[page, place % size].set(x, mode="drop", unique_indices=True)
        # Else the compiler may lay out the loop over layers as x is laid out, and turn all pages
        # that way and back in every call.
        return with_layout_constraint(new, Layout(tuple(range(new.ndim))))

    def read(
        self,
        pool: Float[Array, "P p K W"],
        layer,
        first: Int[Array, " B"],
        count: int,
        stop: Int[Array, " B"],
    ) -> Float[Array, "B count K W"]:
        """Entries first .. first + count - 1 of each sequence, a copy.

        What is not among the entries 0 .. stop - 1 that the sequence has is 0. So nothing that
        other sequences left in a page, NaN say, is ever read.
        """
        size = pool.shape[1]
        place = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        there = (place >= 0) & (place < stop[:, None])
        number = jnp.clip(place // size, 0, self.page_table.shape[1] - 1)
        page = jnp.take_along_axis(self.pages(layer), number, axis=1)
        return jnp.where(there[..., None, None], pool[page, place % size], 0)

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
      tail_key: [L, B, R, K, D], the last R tokens of each sequence before RoPE, token t in place
        t % R: those of windows that are not yet whole, and `rollback` more.
      tail_value: [L, B, R, K, E], R = max(l - 1 + rollback, 1).
      config: sizes of the attention.
      rollback: the most tokens that `rewind` may take back.
    """

    window_key: Float[Array, "P p K D"] | None
    window_value: Float[Array, "P p K E"] | None
    compressed_key: Float[Array, "P q K D"]
    compressed_value: Float[Array, "P q K E"]
    tail_key: Float[Array, "L B R K D"]
    tail_value: Float[Array, "L B R K E"]
    config: NSAConfig = dataclasses.field(metadata=_STATIC)
    rollback: int = dataclasses.field(metadata=_STATIC)

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
        rollback: int = 0,
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
          rollback: the most tokens that `rewind` may take back.
          layers: L.

        Raises:
          ValueError: a size is not a positive integer.

        Example:
          >>> cache = NSACache.init(2, 100, config=NSAConfig(), num_kv_heads=1, head_dim=8)
          >>> cache.key.shape, cache.compressed_key.shape, cache.capacity
          ((4, 64, 1, 8), (4, 4, 1, 8), 128)
        """
        size, stride = checks.config(config).block_size, config.kernel_stride
        room = max(config.kernel_size - 1 + checks.size("rollback", rollback, least=0), 1)
        places = _init_places(batch, capacity, size, num_pages)
        pages = layers * places.pop("pages")

        def pool(entries: int) -> Array:
            return jnp.zeros((pages, entries, num_kv_heads, head_dim), dtype)

        def tail() -> Array:
            return jnp.zeros((layers, batch, room, num_kv_heads, head_dim), dtype)

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
            rollback=rollback,
            **places,
        )

    @property
    def _rollback(self) -> int:
        return self.rollback

    def traits(self) -> dict[str, Any]:
        """As in `KVCache`."""
        own = self.window_key is not None
        return super().traits() | {"config": self.config, "window_of_its_own": own}

    @property
    def windows(self) -> int:
        """Compressed windows that a sequence may have."""
        return self.capacity // self.config.kernel_stride

    def windows_before(self, stop: Int[Array, "..."]) -> Int[Array, "..."]:
        """How many windows end before token `stop` of a sequence."""
        size, stride = self.config.kernel_size, self.config.kernel_stride
        return jnp.maximum((stop - size + stride) // stride, 0)

    def read_compressed(self, layer, chunk: Chunk, count: int) -> tuple[Array, Array]:
        """Keys and values [B, count, K, ...] of the first windows, with those of the chunk."""
        nothing = jnp.zeros_like(chunk.first)
        stop = self.windows_before(chunk.stop)
        pools = (self.compressed_key, self.compressed_value)
        key, value = (self.read(pool, layer, nothing, count, stop) for pool in pools)
        return key, value

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
        before, room = size - 1, self.tail_key.shape[2]
        oldest = chunk.first - before  # position of the first token at hand
        # windows end in the chunk: they start with the oldest token or after it
        first = jnp.maximum(0, -(-oldest // stride)) * stride
        length = (count - 1) * stride + size
        number = first[:, None] // stride + jnp.arange(count, dtype=jnp.int32)[None]
        whole = number * stride + size <= chunk.stop[:, None]
        row = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]
        past = oldest[:, None] + jnp.arange(before, dtype=jnp.int32)[None]
        kept = chunk.valid & (chunk.position >= chunk.stop[:, None] - room)
        # tokens that are not kept go behind the end, each to a place of its own
        nowhere = room + jnp.arange(key.shape[1], dtype=jnp.int32)[None]
        slot = jnp.where(kept, chunk.position % room, nowhere)

        def windows(tail: Array, x: Array) -> Array:
            """The tokens of the windows, [B, length, K, W]."""
            # places of a sequence that has fewer tokens are another's, which no window starts in
            both = jnp.concatenate([tail[layer, row, past % room], x], axis=1)
            # room for windows that are not whole; they are not stored
            both = jnp.pad(both, ((0, 0), (0, length), (0, 0), (0, 0)))
            take = jax.vmap(jax.lax.dynamic_slice_in_dim, (0, 0, None))
            return take(both, first - oldest, length)

        def after(tail: Array, x: Array) -> Array:
            return tail.at[layer, row, slot].set(x, mode="drop", unique_indices=True)

        new_key = compress_key(windows(self.tail_key, key), number * stride)
        new_value = compress_value(windows(self.tail_value, value))
        pools = (self.compressed_key, self.compressed_value)
        compressed_key, compressed_value = (
            self.write(pool, x[:, :count], layer, number, whole)
            for pool, x in zip(pools, (new_key, new_value), strict=True)
        )
        return dataclasses.replace(
            self,
            compressed_key=compressed_key,
            compressed_value=compressed_value,
            tail_key=after(self.tail_key, key),
            tail_value=after(self.tail_value, value),
        )


def _known(*arrays: Array) -> bool:
    """Whether the numbers are known here, which inside jit they are not."""
    return all(not isinstance(x, Tracer) and x.is_fully_addressable for x in arrays)


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
