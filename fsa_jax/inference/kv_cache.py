"""Caches of keys and values for inference: pages, a page table, and lengths.

Keys and values stand in pages of `page_size` tokens. A sequence has a list of pages, its row of the
page table; token t of it is in place t % page_size of page number t // page_size. So sequences come
and go without a move of memory, and a cache whose pages follow one another is the special case that
`init` makes unless it is given a number of pages.

Pages of all layers stand in one array, layer after layer: a scan over layers carries that array and
writes into it in place, and a layer reads it through the page table plus its first page.

Whether `rewind` may take tokens back depends on what earlier calls did, so a cache keeps count of
that, also inside jit, where no error can be raised: a sequence that went too far back is `lost`.

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

from fsa_jax.arguments import checks

STATIC: Any = {"static": True}


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
      lost: bool [B], sequences of which a call inside jit took back more than it may, or that
        `advance` moved by a chunk of another cache. Until such a sequence is emptied (`fresh=True`,
        `release`) nothing is stored, layers and models give NaN for it, and outside jit `place` and
        `rewind` raise.
      layers: L; P is L times the number of pages that a layer has.
    """

    key: Float[Array, "P p K D"]
    value: Float[Array, "P p K E"]
    page_table: Int[Array, "B J"]
    lengths: Int[Array, " B"]
    lost: Bool[Array, " B"]
    layers: int = dataclasses.field(metadata=STATIC)

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
          dtype: of keys and values, one that the attention functions compute with.
          page_size: tokens of a page.
          num_pages: pages of a layer, which a `PageAllocator` hands out; None: every sequence has
            its pages from the start.
          layers: L.

        Raises:
          ValueError: a size is not a positive integer, or the dtype is another.
        """
        places = init_places(batch, capacity, page_size, num_pages)
        layers = checks.size("layers", layers)
        pages = layers * places.pop("pages")
        dtype, heads = checks.float_dtype("dtype", dtype), heads_of(num_kv_heads, head_dim)
        shape = (pages, page_size, *heads)
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

    @property
    def history(self) -> dict[str, Array]:
        """What the cache knows of each sequence, [B] each: 0 or False for an empty one."""
        return {"lengths": self.lengths, "lost": self.lost}

    def emptied(self, rows: Bool[Array, " B"] | None = None) -> Self:
        """The cache without any token of some sequences (None: of all); they keep their pages."""
        if rows is None:
            return dataclasses.replace(self, **jax.tree.map(jnp.zeros_like, self.history))
        new = {k: jnp.where(rows, jnp.zeros_like(x), x) for k, x in self.history.items()}
        return dataclasses.replace(self, **new)

    def place(self, length: int, num_tokens: Array | None = None) -> Chunk:
        """Where the next `length` tokens of each sequence stand.

        Args:
          length: tokens n of a row of the call.
          num_tokens: int32 [B], how many of them are there; None: all.

        Raises:
          ValueError: a shape does not fit; or, where the numbers are known, that is outside jit, a
            number is not in 0 .. n, or a sequence has no room or is lost. Inside jit such tokens
            count as padding: they are not stored, and their results are 0, or NaN if lost.
        """
        length = checks.size("length", length)
        if num_tokens is None:
            num_tokens = jnp.full(self.lengths.shape, length, jnp.int32)
        num_tokens = self._numbers("num_tokens", num_tokens)
        self._check_room(length, num_tokens)
        token = jnp.arange(length, dtype=jnp.int32)[None]
        position = self.lengths[:, None] + token
        valid = (token < num_tokens[:, None]) & (position < self.room[:, None])
        return Chunk(position, valid & ~self.lost[:, None])

    def _check_room(self, length: int, num_tokens: Array) -> None:
        known = (num_tokens, self.lengths, self.page_table, self.lost)
        if not is_known(*known):
            return
        counts, lengths, table, lost = (np.asarray(x) for x in known)
        if counts.min() < 0 or counts.max() > length:
            raise ValueError(f"num_tokens must be in 0 .. {length}, got {counts.tolist()}")
        self._check_lost(lost & (counts > 0))
        room = (table >= 0).sum(axis=1) * self.page_size
        for row in np.flatnonzero((lengths + counts > room) & (counts > 0)):
            raise ValueError(
                f"the cache has room for {room[row]} tokens of sequence {row}, which holds "
                f"{lengths[row]} and would get {counts[row]} more"
            )

    def _check_lost(self, lost: np.ndarray) -> None:
        for row in np.flatnonzero(lost):
            raise ValueError(
                f"cache must know the tokens of sequence {row}, got one that a call inside jit "
                f"rewound too far (rollback={self._rollback}) or advanced by another cache's "
                "chunk; start it anew with fresh=True or release it"
            )

    def advance(self, chunk: Chunk) -> Self:
        """The cache with the lengths after `chunk` has been written in every layer.

        Raises:
          ValueError: outside jit, the chunk is not what `place` gave for this cache. Inside jit the
            sequences that are not where it starts are lost.
        """
        if not isinstance(chunk, Chunk):
            raise ValueError(f"chunk must be what place gives, got {type(chunk).__name__}")
        known = is_known(chunk.position, chunk.valid, self.lengths)
        stale = chunk.first != self.lengths
        if known and np.any(np.asarray(stale)):
            raise ValueError(
                f"chunk must start where the sequences end, at {self.lengths.tolist()}, got "
                f"{chunk.first.tolist()}: it is of another cache, or has been added before"
            )
        return dataclasses.replace(self, lengths=chunk.stop, lost=self.lost | stale)

    def rewind(self, count: Int[Array, " B"]) -> Self:
        """The cache without the last `count` tokens of each sequence, for drafts that were wrong.

        Args:
          count: int32 [B], tokens that each sequence loses. In an `NSACache` no sequence can
            become shorter than the most tokens that it has had, less `rollback`, however many
            calls of `rewind`, with or without new tokens between them, take it there.

        Raises:
          ValueError: a shape does not fit; or, outside jit, a number is too large or negative.
            Inside jit the sequences of such numbers are lost, see `KVCache`.
        """
        count = self._numbers("count", count)
        known = is_known(count, *self.history.values())
        allowed = (count >= 0) & (count <= self._removable)
        if known:
            self._check_lost(np.asarray(self.lost & (count > 0)))
        if known and not np.all(np.asarray(allowed)):
            raise ValueError(
                f"count must be in 0 .. {self._removable.tolist()} (rollback={self._rollback}, "
                f"lengths={self.lengths.tolist()}), got {count.tolist()}"
            )
        return self._shortened(jnp.where(allowed, count, 0), self.lost | ~allowed)

    def _shortened(self, count: Int[Array, " B"], lost: Bool[Array, " B"]) -> Self:
        return dataclasses.replace(self, lengths=self.lengths - count, lost=lost)

    @property
    def _removable(self) -> Int[Array, " B"]:
        """The most tokens that each sequence may lose."""
        return self.lengths

    @property
    def _rollback(self) -> int | None:
        """The most tokens that all calls of `rewind` together may take back; None: all."""
        return None

    def marked(self, y: Float[Array, "B n C"]) -> Float[Array, "B n C"]:
        """`y`, NaN for the sequences that are lost."""
        return jnp.where(self.lost[:, None, None], jnp.nan, y)

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


def is_known(*arrays: Array) -> bool:
    """Whether the numbers of a cache are known here, which inside jit they are not.

    Raises:
      ValueError: they are gone: a call of jit was given the cache to keep.
    """
    for x in arrays:
        if not isinstance(x, Tracer) and x.is_deleted():
            raise ValueError(
                "cache must not have been donated, got one that an earlier call of jit took "
                "(donate_argnums); go on with the cache that it returned"
            )
    return checks.is_known(*arrays)


def heads_of(num_kv_heads: int, head_dim: int) -> tuple[int, int]:
    return checks.size("num_kv_heads", num_kv_heads), checks.size("head_dim", head_dim)


def init_places(batch: int, capacity: int, page_size: int, num_pages: int | None) -> dict:
    """Page table and lengths of an empty cache, and the number of pages of a layer."""
    batch, capacity = checks.size("batch", batch), checks.size("capacity", capacity)
    columns = -(-capacity // checks.size("page_size", page_size))
    if num_pages is None:
        table = jnp.arange(batch * columns, dtype=jnp.int32).reshape(batch, columns)
        num_pages = batch * columns
    else:
        num_pages = checks.size("num_pages", num_pages)
        table = jnp.full((batch, columns), -1, jnp.int32)
    history = {"lengths": jnp.zeros((batch,), jnp.int32), "lost": jnp.zeros((batch,), bool)}
    return {"pages": num_pages, "page_table": table, **history}
