"""What a packed sequence implies: documents, positions, compressed windows, selected blocks.

This file is the only place with rules about document boundaries. A document is a run of equal
positive segment ids; id 0 marks padding. Positions count from the first token of the document.

Shapes: B batch, T tokens of a sequence, K key/value heads, S listed blocks, M compressed windows.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Integer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentInfo:
    """Where each token's document starts and ends.

    Attributes:
      start: int32 [B, T], the first token of the document that contains the token.
      end: int32 [B, T], one past the last token of that document.
      valid: bool [B, T], False at padding.
      packed: False when no segment ids were given, so that every sequence is one whole document.
    """

    start: Int[Array, "B T"]
    end: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    packed: bool = dataclasses.field(metadata={"static": True})

    @property
    def token(self) -> Int[Array, "1 T"]:
        """Token indices of the sequence, 0 .. T-1."""
        return jnp.arange(self.start.shape[1], dtype=jnp.int32)[None, :]

    @property
    def position(self) -> Int[Array, "B T"]:
        """The position of each token within its document."""
        return self.token - self.start

    def without_padding(self, x: Array) -> Array:
        """Applies `cut` at padding; without segment ids there is no padding."""
        return cut(x, self.valid) if self.packed else x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """Which compressed windows exist and which of them each query sees.

    A sequence has M = T // kernel_stride slots. These suffice for all of its documents, since a
    document of L tokens has at most L // kernel_stride windows. The windows fill the slots in the
    order of their start.

    Attributes:
      start: int32 [B, M], the first token of the slot's window; T where the slot is empty.
      first: int32 [B, T], the slot of the first window of the token's document.
      visible: int32 [B, T], the number of slots, counted from `first`, that the query at this
        token sees.
    """

    start: Int[Array, "B M"]
    first: Int[Array, "B T"]
    visible: Int[Array, "B T"]


def cut(x: Array, valid: Bool[Array, "B T"]) -> Array:
    """Sets the array [B, T, ...] to 0 where `valid` is False, and likewise its cotangents.

    Values and cotangents at padding may be NaN. A product with 0 would keep the NaN and a sum over
    tokens would spread it, so they are replaced before either.
    """
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, 0)


def describe_segments(
    segment_ids: Integer[Array, "B T"] | None, batch: int, length: int
) -> SegmentInfo:
    """Finds the documents of each sequence; without segment ids a sequence is one document."""
    if segment_ids is None:
        zeros = jnp.zeros((batch, length), jnp.int32)
        return SegmentInfo(zeros, zeros + length, jnp.ones((batch, length), bool), packed=False)
    token = jnp.arange(length, dtype=jnp.int32)[None, :]
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((batch, min(length, 1)), bool)
    opens = jnp.concatenate([edge, changes], axis=1)
    closes = jnp.concatenate([changes, edge], axis=1)
    start = jax.lax.cummax(jnp.where(opens, token, 0), axis=1)
    end = jax.lax.cummin(jnp.where(closes, token + 1, length), axis=1, reverse=True)
    return SegmentInfo(start, end, segment_ids > 0, packed=True)


def describe_windows(segments: SegmentInfo, kernel_size: int, kernel_stride: int) -> Windows:
    """Lays out the compressed windows of every document of every sequence."""
    batch, length = segments.start.shape
    opens = (
        segments.valid
        & (segments.position % kernel_stride == 0)
        & (kernel_size <= segments.end - segments.token)
    )
    # the number of slots that are taken by windows which start before this token
    taken = jnp.cumsum(opens, axis=1, dtype=jnp.int32) - opens.astype(jnp.int32)
    slots = length // kernel_stride
    empty = jnp.full((batch, slots), length, jnp.int32)
    tokens = jnp.broadcast_to(segments.token, (batch, length))
    target = jnp.where(opens, taken, slots)  # an index past the end is dropped
    start = jax.vmap(lambda e, i, t: e.at[i].set(t, mode="drop"))(empty, target, tokens)
    seen = (segments.position - kernel_size + 1 + kernel_stride) // kernel_stride
    return Windows(
        start=start,
        first=jnp.take_along_axis(taken, segments.start, axis=1),
        visible=jnp.where(segments.valid, jnp.maximum(seen, 0), 0),
    )


def window_positions(
    segments: SegmentInfo, positions: Int[Array, "B T"] | None, kernel_size: int, kernel_stride: int
) -> Int[Array, "B M"]:
    """The position of each window's first token; 0 in empty slots.

    Where `positions` is None, the positions within the documents of `segments` are used.
    """
    positions = segments.position if positions is None else positions
    read = jax.vmap(lambda row, start: row.at[start].get(mode="fill", fill_value=0))
    return read(positions, describe_windows(segments, kernel_size, kernel_stride).start)


def visible_windows(windows: Windows) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The range of slots [low, high) that each query sees; it is empty for a query without any."""
    return windows.first, windows.first + windows.visible


def visible_tokens(
    segments: SegmentInfo, window_size: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The range of tokens [low, high) in each query's sliding window; it is empty at padding."""
    low = jnp.maximum(segments.start, segments.token - (window_size - 1))
    high = jnp.broadcast_to(segments.token + 1, low.shape)
    return jnp.where(segments.valid, low, high), high


def query_range_of_windows(
    segments: SegmentInfo, windows: Windows, kernel_size: int
) -> tuple[Int[Array, "B M"], Int[Array, "B M"]]:
    """The range of queries [low, high) that attend to each slot; it is empty for an empty slot."""
    exists = windows.start < segments.start.shape[1]
    start = jnp.where(exists, windows.start, 0)
    end = jnp.take_along_axis(segments.end, start, axis=1)
    return jnp.where(exists, start + (kernel_size - 1), 0), jnp.where(exists, end, 0)


def query_range_of_tokens(
    segments: SegmentInfo, window_size: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The range of queries [low, high) whose sliding window contains each key.

    The range is empty at padding.
    """
    low = jnp.broadcast_to(segments.token, segments.start.shape)
    high = jnp.minimum(low + min(window_size, segments.start.shape[1]), segments.end)
    return low, jnp.where(segments.valid, high, low)


def listed_block_starts(
    segments: SegmentInfo, block_indices: Int[Array, "B T K S"], block_size: int
) -> Int[Array, "B T K S"]:
    """The first token of each listed block; T where the entry is ignored.

    An entry is used if its block starts at or before the query, in the query's document, and the
    same block number does not occur earlier in the list.
    """
    length = segments.start.shape[1]
    own = jnp.where(segments.valid, segments.position // block_size, -1)[:, :, None, None]
    counts = (block_indices >= 0) & (block_indices <= own)
    same = block_indices[..., :, None] == block_indices[..., None, :]
    slots = jnp.arange(block_indices.shape[-1], dtype=jnp.int32)
    repeated = jnp.any(same & (slots[None, :] < slots[:, None])[None, None, None], axis=-1)
    # Only numbers in range are multiplied: the list may hold block numbers of up to 2**31.
    offset = jnp.where(counts, block_indices, 0) * block_size
    return jnp.where(counts & ~repeated, segments.start[:, :, None, None] + offset, length)
