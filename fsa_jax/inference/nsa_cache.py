"""The cache of native sparse attention; `kv_cache.py` is what it shares with full attention.

Shapes as in `kv_cache.py`, and: q compressed windows of a page, R tokens of a tail, l kernel_size,
d kernel_stride.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fsa_jax.arguments import checks
from fsa_jax.config import NSAConfig
from fsa_jax.inference.kv_cache import STATIC, heads_of, init_places
from fsa_jax.inference.kv_cache import Chunk as Chunk
from fsa_jax.inference.kv_cache import KVCache as KVCache


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
      rewound: int32 [B], tokens of each sequence that were taken back and not added anew: the tail
        ends so many tokens behind the sequence.
      config: sizes of the attention.
      rollback: the most tokens that `rewind` may take back, in all its calls together.
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
        """An empty cache; arguments as in `KVCache.init`, whose page size is the block size.

        Args:
          batch: sequences B.
          capacity: tokens that a sequence may have; rounded up to whole blocks.
          config: sizes of the attention.
          num_kv_heads: K.
          head_dim: D and E.
          dtype: of keys and values, one that the attention functions compute with.
          window_of_its_own: whether the window has keys and values of its own.
          num_pages: see `KVCache.init`.
          rollback: the most tokens that `rewind` may take back, in all its calls together.
          layers: L.

        Raises:
          ValueError: a size is not a positive integer, or the dtype is another.

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
