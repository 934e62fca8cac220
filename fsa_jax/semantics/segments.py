"""What a packed row implies: documents, positions, compressed windows, selected blocks.

Every rule about document boundaries stands in this file and nowhere else. A document is a run of
equal positive segment ids; id 0 is padding. Positions count from the first token of the document.

Shapes: B batch, T tokens in a row, K key/value heads, S listed blocks, M compressed windows.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Integer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where each token's document starts and ends.

    Attributes:
      start: int32 [B, T], first token of the token's own document.
      end: int32 [B, T], one past the last token of the document.
      valid: bool [B, T], False at padding.
      packed: False when every row is known to be one whole document (no segment ids given).
    """

    start: Int[Array, "B T"]
    end: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    packed: bool = dataclasses.field(metadata={"static": True})

    @property
    def token(self) -> Int[Array, "1 T"]:
        """Token numbers of the row, 0 .. T-1."""
        return jnp.arange(self.start.shape[1], dtype=jnp.int32)[None, :]

    @property
    def position(self) -> Int[Array, "B T"]:
        """Positions of the tokens in their own documents."""
        return self.token - self.start

    def without_padding(self, x: Array) -> Array:
        """`cut` at padding; rows without segment ids have none."""
        return cut(x, self.valid) if self.packed else x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """Which compressed windows exist and which of them a query sees.

    A row has M = T // kernel_stride slots. Documents need at most that many windows together, since
    one of L tokens has at most L // kernel_stride. Windows fill the slots in order of their start.

    Attributes:
      start: int32 [B, M], first token of the slot's window; T where the slot is empty.
      first: int32 [B, T], slot of the first window of the token's document.
      visible: int32 [B, T], how many slots from `first` on the query at this token sees.
    """

    start: Int[Array, "B M"]
    first: Int[Array, "B T"]
    visible: Int[Array, "B T"]


def cut(x: Array, valid: Bool[Array, "B T"]) -> Array:
    """The array [B, T, ...] with 0 where no token is; the cotangents from there end here too.

    Both may be NaN. A product with 0 would keep it, and a sum over tokens would spread it, so they
    are taken away before either.
    """
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, 0)


def describe_rows(segment_ids: Integer[Array, "B T"] | None, batch: int, length: int) -> Rows:
    """Finds the documents of each row; without segment ids a row is one document."""
    if segment_ids is None:
        zeros = jnp.zeros((batch, length), jnp.int32)
        return Rows(zeros, zeros + length, jnp.ones((batch, length), bool), packed=False)
    token = jnp.arange(length, dtype=jnp.int32)[None, :]
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((batch, min(length, 1)), bool)
    opens = jnp.concatenate([edge, changes], axis=1)
    closes = jnp.concatenate([changes, edge], axis=1)
    start = jax.lax.cummax(jnp.where(opens, token, 0), axis=1)
    end = jax.lax.cummin(jnp.where(closes, token + 1, length), axis=1, reverse=True)
    return Rows(start, end, segment_ids > 0, packed=True)


def describe_windows(rows: Rows, kernel_size: int, kernel_stride: int) -> Windows:
    """Lays out the compressed windows of every document of every row."""
    batch, length = rows.start.shape
    opens = (
        rows.valid & (rows.position % kernel_stride == 0) & (kernel_size <= rows.end - rows.token)
    )
    # slots taken by windows that start before this token
    taken = jnp.cumsum(opens, axis=1, dtype=jnp.int32) - opens.astype(jnp.int32)
    slots = length // kernel_stride
    empty = jnp.full((batch, slots), length, jnp.int32)
    tokens = jnp.broadcast_to(rows.token, (batch, length))
    target = jnp.where(opens, taken, slots)  # one past the end: dropped
    start = jax.vmap(lambda e, i, t: e.at[i].set(t, mode="drop"))(empty, target, tokens)
    seen = (rows.position - kernel_size + 1 + kernel_stride) // kernel_stride
    return Windows(
        start=start,
        first=jnp.take_along_axis(taken, rows.start, axis=1),
        visible=jnp.where(rows.valid, jnp.maximum(seen, 0), 0),
    )


def window_positions(
    rows: Rows, positions: Int[Array, "B T"] | None, kernel_size: int, kernel_stride: int
) -> Int[Array, "B M"]:
    """The position of each window's first token, 0 in empty slots; None: of `rows`."""
    positions = rows.position if positions is None else positions
    read = jax.vmap(lambda row, start: row.at[start].get(mode="fill", fill_value=0))
    return read(positions, describe_windows(rows, kernel_size, kernel_stride).start)


def visible_windows(windows: Windows) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The range of slots [low, high) that each query sees; empty where it sees none."""
    return windows.first, windows.first + windows.visible


def visible_tokens(rows: Rows, window_size: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The range of tokens [low, high) in each query's sliding window; empty at padding."""
    low = jnp.maximum(rows.start, rows.token - (window_size - 1))
    high = jnp.broadcast_to(rows.token + 1, low.shape)
    return jnp.where(rows.valid, low, high), high


def seers_of_windows(
    rows: Rows, windows: Windows, kernel_size: int
) -> tuple[Int[Array, "B M"], Int[Array, "B M"]]:
    """The range of tokens [low, high) that see each slot; empty where the slot is."""
    exists = windows.start < rows.start.shape[1]
    start = jnp.where(exists, windows.start, 0)
    end = jnp.take_along_axis(rows.end, start, axis=1)
    return jnp.where(exists, start + (kernel_size - 1), 0), jnp.where(exists, end, 0)


def seers_of_tokens(rows: Rows, window_size: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The range of tokens [low, high) whose sliding window shows each token; empty at padding."""
    low = jnp.broadcast_to(rows.token, rows.start.shape)
    high = jnp.minimum(low + min(window_size, rows.start.shape[1]), rows.end)
    return low, jnp.where(rows.valid, high, low)


def listed_block_starts(
    rows: Rows, block_indices: Int[Array, "B T K S"], block_size: int
) -> Int[Array, "B T K S"]:
    """First token of each listed block; T where the entry does not count.

    An entry counts if its block starts at or before the query, in the query's own document, and
    the same number does not stand earlier in the list.
    """
    length = rows.start.shape[1]
    own = jnp.where(rows.valid, rows.position // block_size, -1)[:, :, None, None]
    counts = (block_indices >= 0) & (block_indices <= own)
    same = block_indices[..., :, None] == block_indices[..., None, :]
    slots = jnp.arange(block_indices.shape[-1], dtype=jnp.int32)
    repeated = jnp.any(same & (slots[None, :] < slots[:, None])[None, None, None], axis=-1)
    # multiply only what is in range: block numbers of up to 2**31 may stand in the list
    offset = jnp.where(counts, block_indices, 0) * block_size
    return jnp.where(counts & ~repeated, rows.start[:, :, None, None] + offset, length)
