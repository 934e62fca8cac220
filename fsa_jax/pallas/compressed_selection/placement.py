"""Where the compressed keys stand for the kernels, and which queries make up a chunk.

**Places.** A tile of keys must hold whole blocks, but the windows of a document may follow those of
the previous one at any slot. So the windows of long documents, whose queries need scores, move up
to a multiple of r, the strides of a block, and the windows after them move up as well.

**Chunks.** A step is a tile of keys of a work item. Items are numbered in the order in which the
kernels take them, and so are the steps of those that have queries that need scores. A chunk has the
items whose first steps are in the same part of `size` steps.

Shapes: B sequences, T tokens, K key/value heads, M window slots, P places, I work items of a key
head of a sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fsa_jax.config import NSAConfig
from fsa_jax.pallas.compressed_selection.fold import KEYS, window_of_column
from fsa_jax.semantics.segments import SegmentInfo, Windows


class Places(NamedTuple):
    """Where the windows of each query's document stand.

    Attributes:
      own: int32 [B, T], the block of the token within its document, -1 at padding.
      first: int32 [B, T], the place of the first window of the token's document.
      slot: int32 [B, P], the slot of the window in each column of each tile, M or more: none.
    """

    own: Int[Array, "B T"]
    first: Int[Array, "B T"]
    slot: Int[Array, "B P"]


def most_places(length: int, slots: int, config: NSAConfig, packed: bool) -> int:
    """P for sequences of `length` tokens: a multiple of KEYS."""
    per_block = config.block_size // config.kernel_stride
    # each long document takes up at most r further places; two may be here only in part
    long = length // (config.topk * config.block_size) + 2 if packed and per_block > 1 else 0
    return -(-(slots + per_block * long) // KEYS) * KEYS


def place_windows(segments: SegmentInfo, windows: Windows, slots: int, config: NSAConfig) -> Places:
    """Places of the windows of all documents that the queries belong to."""
    batch, length = segments.start.shape
    places = most_places(length, slots, config, segments.packed)
    own = jnp.where(segments.valid, segments.position // config.block_size, -1)
    column = jnp.arange(places, dtype=jnp.int32)
    ordered = column // KEYS * KEYS + window_of_column(column % KEYS)
    if not segments.packed or config.block_size == config.kernel_stride:  # aligned as they are
        slot = jnp.broadcast_to(ordered, (batch, places))
        return Places(own, windows.first, slot)
    shift = _shifts(segments, windows, config)
    # the shift of a slot is that of the last document whose windows begin there or before
    of_slot = jnp.zeros((batch, slots), jnp.int32)
    at = jnp.where(windows.visible > 0, windows.first, slots)
    of_slot = jax.vmap(lambda x, i, s: x.at[i].max(s, mode="drop"))(of_slot, at, shift)
    of_slot = jax.lax.cummax(of_slot, axis=1)
    slot = jnp.arange(slots, dtype=jnp.int32)
    empty = jnp.full((batch, places), slots, jnp.int32)
    slot_at = jax.vmap(lambda x, i: x.at[slot + i].set(slot, mode="drop"))(empty, of_slot)
    return Places(own, windows.first + shift, slot_at[:, ordered])


def _shifts(segments: SegmentInfo, windows: Windows, config: NSAConfig):
    """By how many places the windows of each token's document move up, int32 [B, T]."""
    per_block = config.block_size // config.kernel_stride
    size = segments.end - segments.start
    long = segments.valid & (size > config.topk * config.block_size)
    opens = long & _first_of_document(segments)
    before = jnp.cumsum(opens, axis=1, dtype=jnp.int32)
    # long documents that begin before this one
    before = before - jnp.where(long, 1, 0)
    shift = per_block * before
    to_multiple = -(windows.first + shift) % per_block
    return shift + jnp.where(long, to_multiple, 0)


def _first_of_document(segments: SegmentInfo):
    """Whether a token is the first of its document among the queries."""
    start = segments.start
    changes = start[:, 1:] != start[:, :-1]
    return jnp.concatenate([jnp.ones((start.shape[0], 1), bool), changes], axis=1)


class Chunks(NamedTuple):
    """How the work items are divided into chunks.

    Attributes:
      base: int32 [I*B*K], the number of the first step of each item; -1 if none of its queries
        needs scores.
      spans: int32 [chunks, 3]: the first item of a chunk, one past its last, and the number of the
        chunk's first step. The last chunks may be empty.
    """

    base: Int[Array, " items"]
    spans: Int[Array, "chunks 3"]

    @classmethod
    def of(cls, bounds, scored, kv_heads: int, number: int, size: int) -> "Chunks":
        """A number of chunks of at most `size` steps each, and the rest of their last items.

        `bounds` is int32 [B, I, 4], from `hopper_layout.bounds_of_items`; `scored` bool [B, I].
        """

        def of_items(x):
            x = x[:, ::-1].T[:, :, None]
            return jnp.broadcast_to(x, (*x.shape[:2], kv_heads)).reshape(-1)

        steps = of_items(jnp.where(scored, bounds[:, :, 3] - bounds[:, :, 0], 0))
        end = jnp.cumsum(steps, dtype=jnp.int32)
        base, total = end - steps, end[-1]
        first = jnp.arange(number, dtype=jnp.int32) * size
        begin = jnp.searchsorted(base, first).astype(jnp.int32)
        begin = jnp.where((first < total) | (first == 0), begin, base.size)
        spans = (begin, jnp.append(begin[1:], jnp.int32(base.size)), first)
        return cls(jnp.where(steps > 0, base, -1), jnp.stack(spans, axis=1))
