"""Caches of keys and values for inference: pages, a page table, and lengths.

Keys and values are stored in pages of `page_size` tokens. A sequence has a list of pages, which is
its row of the page table; its token t is at index t % page_size of page number t // page_size.
Sequences can therefore be added and removed without moving memory. Unless `init` is given a number
of pages, it makes the special case in which the pages of each sequence are contiguous.

The pages of all layers are stored in one array, layer after layer. A scan over layers carries that
array and writes into it in place, and each layer reads it through the page table, offset by the
first page of the layer.

Whether `rewind` may remove tokens depends on what earlier calls did. The cache keeps count of that
inside jit too, where no error can be raised: a sequence that went back too far is marked `lost`.

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
    """The positions of the tokens of a call in their sequences.

    Attributes:
      position: int32 [B, n], positions in the sequences.
      valid: bool [B, n], False at padding, which follows the tokens of each sequence.
    """

    position: Int[Array, "B n"]
    valid: Bool[Array, "B n"]

    @property
    def first(self) -> Int[Array, " B"]:
        """The number of tokens of each sequence before the call."""
        return self.position[:, 0]

    @property
    def stop(self) -> Int[Array, " B"]:
        """The number of tokens of each sequence after the call."""
        return self.first + jnp.sum(self.valid, axis=1, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of full attention.

    Attributes:
      key: [P, p, K, D], after RoPE.
      value: [P, p, K, E].
      page_table: int32 [B, J], the pages of each sequence in the order of its tokens, then -1.
      lengths: int32 [B], the number of tokens of each sequence.
      lost: bool [B], True for a sequence from which a call inside jit removed more tokens than
        allowed, or which `advance` moved by a chunk of another cache. Until such a sequence is
        emptied (`fresh=True`, `release`), nothing is stored for it, layers and models return NaN
        for it, and outside jit `place` and `rewind` raise an error.
      layers: L; P is L times the number of pages of a layer.
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
        """An empty cache; `init_cache` of a layer or a model calls this with the right sizes.

        Args:
          batch: number of sequences B.
          capacity: the most tokens that a sequence can have; it is rounded up to whole pages.
          num_kv_heads: K.
          head_dim: D and E.
          dtype: dtype of keys and values, one that the attention functions support.
          page_size: tokens of a page.
          num_pages: pages of a layer, which a `PageAllocator` assigns to sequences; None: every
            sequence has all its pages from the start.
          layers: L.

        Raises:
          ValueError: a size is not a positive integer, or the dtype is not supported.
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
        """The number of tokens of a page."""
        return self.key.shape[1]

    @property
    def capacity(self) -> int:
        """The most tokens that a sequence can have."""
        return self.page_table.shape[1] * self.page_size

    @property
    def room(self) -> Int[Array, " B"]:
        """The number of tokens that the pages of each sequence can hold."""
        return jnp.sum(self.page_table >= 0, axis=1, dtype=jnp.int32) * self.page_size

    @property
    def history(self) -> dict[str, Array]:
        """The state of each sequence besides its pages, [B] each; 0 or False if it is empty."""
        return {"lengths": self.lengths, "lost": self.lost}

    def emptied(self, rows: Bool[Array, " B"] | None = None) -> Self:
        """The cache with some sequences (None: all) emptied; they keep their pages."""
        if rows is None:
            return dataclasses.replace(self, **jax.tree.map(jnp.zeros_like, self.history))
        new = {k: jnp.where(rows, jnp.zeros_like(x), x) for k, x in self.history.items()}
        return dataclasses.replace(self, **new)

    def place(self, length: int, num_tokens: Array | None = None) -> Chunk:
        """The positions of the next `length` tokens of each sequence.

        Args:
          length: tokens n of each sequence in the call, including padding.
          num_tokens: int32 [B], how many of them are not padding; None: all.

        Raises:
          ValueError: a shape does not fit; or, outside jit, where the values are known, a number is
            not in 0 .. n, or a sequence has no room or is lost. Inside jit such tokens count as
            padding: they are not stored, and their results are 0, or NaN for a lost sequence.
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
        """The cache with updated lengths, after `chunk` has been written in every layer.

        Raises:
          ValueError: outside jit, the chunk is not the one that `place` returned for this cache.
            Inside jit the sequences that do not end where the chunk starts are marked lost.
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
        """The cache without the last `count` tokens of each sequence, to reject wrong drafts.

        Args:
          count: int32 [B], number of tokens to remove from each sequence. In an `NSACache`, no
            sequence can become shorter than its greatest length so far minus `rollback`, over any
            number of calls of `rewind`, with or without new tokens between them.

        Raises:
          ValueError: a shape does not fit; or, outside jit, a number is too large or negative.
            Inside jit the sequences with such numbers are marked lost, see `KVCache`.
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
        """The most tokens that can be removed from each sequence."""
        return self.lengths

    @property
    def _rollback(self) -> int | None:
        """The most tokens that all calls of `rewind` together can remove; None: all of them."""
        return None

    def marked(self, y: Float[Array, "B n C"]) -> Float[Array, "B n C"]:
        """Sets `y` to NaN for the sequences that are lost."""
        return jnp.where(self.lost[:, None, None], jnp.nan, y)

    def _numbers(self, name: str, x: Array) -> Array:
        """Checks that `x` has one integer for each sequence."""
        x = checks.integers(name, x, "B")
        if x.shape != self.lengths.shape:
            raise ValueError(
                f"{name} must have one number for each of the {self.lengths.shape[0]} sequences "
                f"of the cache, got shape {x.shape}"
            )
        return x

    def traits(self) -> dict[str, Any]:
        """The properties, by name, in which a cache must match its layer."""
        kv_heads, width = self.key.shape[2:]
        return {
            "kind": type(self).__name__,
            "num_kv_heads": kv_heads,
            "head_dim": width,
            "layers": self.layers,
            "sequences": self.lengths.shape[0],
        }

    def first_page(self, layer: int | Array) -> int | Array:
        """The index of the first page of a layer."""
        return layer * (self.key.shape[0] // self.layers)

    def pages(self, layer: int | Array) -> Int[Array, "B J"]:
        """The page table of a layer; missing entries point to a page of some other sequence."""
        return jnp.maximum(self.page_table, 0) + self.first_page(layer)

    def write(
        self, pool: Float[Array, "P p K W"], x: Float[Array, "B m K W"], layer, place, valid
    ) -> Float[Array, "P p K W"]:
        """Writes entries into pages; `place` int32 [B, m] holds their indices in the sequence."""
        size = pool.shape[1]
        number = jnp.clip(place // size, 0, self.page_table.shape[1] - 1)
        page = jnp.take_along_axis(self.page_table, number, axis=1)
        # invalid entries get distinct out-of-range indices; mode="drop" discards them
        nowhere = pool.shape[0] + jnp.arange(place.size, dtype=jnp.int32).reshape(place.shape)
        page = jnp.where(valid & (page >= 0), page + self.first_page(layer), nowhere)
        new = pool.at[page, place % size].set(x, mode="drop", unique_indices=True)
        # Without the constraint, the compiler may give the arrays of the loop over layers the
        # layout of x, and so transpose all pages to that layout and back in every call.
        return with_layout_constraint(new, Layout(tuple(range(new.ndim))))

    def read(
        self,
        pool: Float[Array, "P p K W"],
        layer,
        first: Int[Array, " B"],
        count: int,
        stop: Int[Array, " B"],
    ) -> Float[Array, "B count K W"]:
        """A copy of the entries first .. first + count - 1 of each sequence.

        Entries outside 0 .. stop - 1 are returned as 0, so that data which another sequence left in
        a page, such as NaN, is never returned.
        """
        size = pool.shape[1]
        place = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        there = (place >= 0) & (place < stop[:, None])
        number = jnp.clip(place // size, 0, self.page_table.shape[1] - 1)
        page = jnp.take_along_axis(self.pages(layer), number, axis=1)
        return jnp.where(there[..., None, None], pool[page, place % size], 0)

    def append(self, key: Array, value: Array, layer, chunk: Chunk) -> Self:
        """The cache with the keys and values [B, n, K, ...] of a chunk written to one layer."""
        return dataclasses.replace(
            self,
            key=self.write(self.key, key, layer, chunk.position, chunk.valid),
            value=self.write(self.value, value, layer, chunk.position, chunk.valid),
        )


def is_known(*arrays: Array) -> bool:
    """Whether the values of a cache are known here; inside jit they are not.

    Raises:
      ValueError: the arrays are deleted, since the cache was donated to a jitted call.
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
    """The page table and state of an empty cache, and the number of pages of a layer."""
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
