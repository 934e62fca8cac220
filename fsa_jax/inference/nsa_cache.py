"""The cache of native sparse attention; `kv_cache.py` holds what it shares with full attention.

Shapes are as in `kv_cache.py`; also q compressed windows of a page, R tokens of a tail, l
kernel_size, d kernel_stride.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fsa_jax.arguments import checks
from fsa_jax.config import NSAConfig
from fsa_jax.inference.kv_cache import STATIC, Chunk, KVCache, heads_of, init_places


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NSACache(KVCache):
    """The cached state of native sparse attention. A page holds one block.

    The sliding window reads the same pages, unless its keys have separate projections.

    Attributes:
      key, value, page_table, lengths, layers: as in `KVCache`; the keys and values of the selected
        branch, and of the sliding window where it shares them.
      window_key, window_value: [P, p, K, D] and [P, p, K, E] of the sliding window if it has
        separate projections, else None.
      compressed_key: [P, p / d, K, D], after RoPE; window i of a sequence is stored in the page of
        its first token i * d.
      compressed_value: [P, p / d, K, E].
      tail_key: [L, B, R, K, D], the last R tokens of each sequence before RoPE, with token t at
        index t % R: the tokens of windows that are not complete yet, and `rollback` more.
      tail_value: [L, B, R, K, E], R = max(l - 1 + rollback, 1).
      rewound: int32 [B], the number of tokens of each sequence that were removed and not replaced:
        the tail ends that many tokens past the end of the sequence.
      config: sizes of the attention.
      rollback: the most tokens that all calls of `rewind` together can remove.
    """

    window_key: Float[Array, "P p K D"] | None
    window_value: Float[Array, "P p K E"] | None
    compressed_key: Float[Array, "P q K D"]
    compressed_value: Float[Array, "P q K E"]
    tail_key: Float[Array, "L B R K D"]
    tail_value: Float[Array, "L B R K E"]
    rewound: Int[Array, " B"]
    config: NSAConfig = dataclasses.field(metadata=STATIC)
    rollback: int = dataclasses.field(metadata=STATIC)

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
        """An empty cache; like `KVCache.init`, with the block size as the page size.

        Args:
          batch: number of sequences B.
          capacity: the most tokens that a sequence can have; it is rounded up to whole blocks.
          config: sizes of the attention.
          num_kv_heads: K.
          head_dim: D and E.
          dtype: dtype of keys and values, one that the attention functions support.
          window_of_its_own: whether the sliding window has separate keys and values.
          num_pages: see `KVCache.init`.
          rollback: the most tokens that all calls of `rewind` together can remove.
          layers: L.

        Raises:
          ValueError: a size is not a positive integer, or the dtype is not supported.

        Example:
          >>> cache = NSACache.init(2, 100, config=NSAConfig(), num_kv_heads=1, head_dim=8)
          >>> cache.key.shape, cache.compressed_key.shape, cache.capacity
          ((4, 64, 1, 8), (4, 4, 1, 8), 128)
        """
        size, stride = checks.config(config).block_size, config.kernel_stride
        layers, rollback = checks.size("layers", layers), checks.size("rollback", rollback, least=0)
        room = max(config.kernel_size - 1 + rollback, 1)
        places = init_places(batch, capacity, size, num_pages)
        pages = layers * places.pop("pages")
        dtype, heads = checks.float_dtype("dtype", dtype), heads_of(num_kv_heads, head_dim)
        checks.flag("window_of_its_own", window_of_its_own)

        def pool(entries: int) -> Array:
            return jnp.zeros((pages, entries, *heads), dtype)

        def tail() -> Array:
            return jnp.zeros((layers, batch, room, *heads), dtype)

        return cls(
            key=pool(size),
            value=pool(size),
            window_key=pool(size) if window_of_its_own else None,
            window_value=pool(size) if window_of_its_own else None,
            compressed_key=pool(size // stride),
            compressed_value=pool(size // stride),
            tail_key=tail(),
            tail_value=tail(),
            rewound=jnp.zeros((batch,), jnp.int32),
            layers=layers,
            config=config,
            rollback=rollback,
            **places,
        )

    @property
    def history(self) -> dict[str, Array]:
        """As in `KVCache`."""
        return super().history | {"rewound": self.rewound}

    @property
    def _rollback(self) -> int:
        return self.rollback

    @property
    def _removable(self) -> Int[Array, " B"]:
        return jnp.minimum(self.lengths, self.rollback - self.rewound)

    def _shortened(self, count: Int[Array, " B"], lost: Bool[Array, " B"]) -> Self:
        return dataclasses.replace(super()._shortened(count, lost), rewound=self.rewound + count)

    def advance(self, chunk: Chunk) -> Self:
        """As in `KVCache`."""
        new = super().advance(chunk)
        left = jnp.maximum(self.rewound - (chunk.stop - chunk.first), 0)
        return dataclasses.replace(new, rewound=left)

    def traits(self) -> dict[str, Any]:
        """As in `KVCache`."""
        own = self.window_key is not None
        return super().traits() | {"config": self.config, "window_of_its_own": own}

    @property
    def windows(self) -> int:
        """The most compressed windows that a sequence can have."""
        return self.capacity // self.config.kernel_stride

    def windows_before(self, stop: Int[Array, "..."]) -> Int[Array, "..."]:
        """The number of windows that end before token `stop` of a sequence."""
        size, stride = self.config.kernel_size, self.config.kernel_stride
        return jnp.maximum((stop - size + stride) // stride, 0)

    def read_compressed(self, layer, chunk: Chunk, count: int) -> tuple[Array, Array]:
        """Keys and values [B, count, K, ...] of the first windows, including the chunk's."""
        nothing = jnp.zeros_like(chunk.first)
        stop = self.windows_before(chunk.stop)
        pools = (self.compressed_key, self.compressed_value)
        key, value = (self.read(pool, layer, nothing, count, stop) for pool in pools)
        return key, value

    @property
    def window_pools(self) -> tuple[Array, Array]:
        """The keys and values that the sliding window reads."""
        if self.window_key is None or self.window_value is None:
            return self.key, self.value
        return self.window_key, self.window_value

    def append_window(self, key: Array, value: Array, layer, chunk: Chunk) -> Self:
        """Like `append`, for a sliding window with separate keys and values."""
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
        """The cache with the windows that a chunk completes, and the tail after the chunk.

        Args:
          key: [B, n, K, D] before RoPE.
          value: [B, n, K, E].
          layer: number of the layer.
          chunk: positions of the tokens.
          compress_key: maps keys [B, t, K, D] of consecutive tokens and the positions [B, m] of the
            first tokens of their windows to compressed keys [B, m, K, D], m = t // d.
          compress_value: maps values in the same way, without positions.
        """
        size, stride = self.config.kernel_size, self.config.kernel_stride
        count = -(-key.shape[1] // stride)  # the most windows that n tokens can complete
        before, room = size - 1, self.tail_key.shape[2]
        oldest = chunk.first - before  # position of the first available token
        # A window that ends in the chunk starts at the oldest token or later.
        first = jnp.maximum(0, -(-oldest // stride)) * stride
        length = (count - 1) * stride + size
        number = first[:, None] // stride + jnp.arange(count, dtype=jnp.int32)[None]
        whole = number * stride + size <= chunk.stop[:, None]
        row = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]
        past = oldest[:, None] + jnp.arange(before, dtype=jnp.int32)[None]
        kept = chunk.valid & (chunk.position >= chunk.stop[:, None] - room)
        # tokens that are not kept get distinct out-of-range indices; mode="drop" discards them
        nowhere = room + jnp.arange(key.shape[1], dtype=jnp.int32)[None]
        slot = jnp.where(kept, chunk.position % room, nowhere)

        def windows(tail: Array, x: Array) -> Array:
            """The tokens of the windows, [B, length, K, W]."""
            # In a sequence with fewer tokens, the remaining entries are left over from another
            # sequence; no window starts in these.
            both = jnp.concatenate([tail[layer, row, past % room], x], axis=1)
            # padding for windows that are not complete, which are not stored
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
