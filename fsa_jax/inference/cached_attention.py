"""Attention of new tokens to a cache.

A query at position t of its sequence sees the windows, blocks and tokens that the definition gives
it, however its sequence is divided into calls. There are two methods, and the number of new tokens
of a sequence in the call decides between them:

* Few tokens (decoding, and verification of drafts): each query reads its selected blocks, the
  window and the compressed keys page by page. That is topk * block_size + window_size +
  T / kernel_stride entries for each token, never the whole cache. On a GPU, `decode_step.py` does
  this. Elsewhere the entries are gathered and dense products taken, since so little work does not
  pay for a loop over tiles.
* Many tokens (a chunk of a long prompt): neighbouring queries select the same blocks, and a copy of
  them for each query would have topk * block_size times the size of the chunk. So the keys of each
  sequence are copied once into a contiguous array, and the operations of training (`fsa_jax.ops`
  with its kernels) run on it. In this layout the chunks of all sequences start at the same token,
  however many tokens precede them, so a batch of sequences of different lengths is one packed
  sequence each.

Shapes: B sequences, n tokens of a chunk, N query heads, K key/value heads, G = N/K, D and E head
widths, m keys, S selected blocks, p tokens of a page, which is a block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from fsa_jax import xla
from fsa_jax.inference.kv_cache import Chunk, KVCache
from fsa_jax.inference.nsa_cache import NSACache
from fsa_jax.ops.block_attention import BlockSpec, Lists, block_attention
from fsa_jax.ops.block_selection import SelectionSpec, choose_blocks
from fsa_jax.ops.call import Backend
from fsa_jax.ops.dispatch import CUDNN, Request, resolve
from fsa_jax.ops.nsa import NAME, NSASpec
from fsa_jax.ops.range_attention import Ranges, RangeSpec, range_attention
from fsa_jax.semantics import segments
from fsa_jax.semantics.precision import accumulation_dtype, einsum
from fsa_jax.semantics.segments import SegmentInfo, Windows

#: The most new tokens of a sequence for which a call counts as decoding: drafts have fewer tokens,
#: and chunks of a prompt have hundreds.
MAX_DECODE_TOKENS = 16

#: The number of queries whose blocks are gathered at a time. 64 queries with the default config and
#: 8 heads of width 128 in bfloat16 take 268 MB.
_GATHERED = 64


_range_attention: Any = range_attention
_block_attention: Any = block_attention


class Branches(NamedTuple):
    """Outputs of the three branches, [B, n, N, E] each."""

    compressed: Float[Array, "B n N E"]
    selected: Float[Array, "B n N E"]
    window: Float[Array, "B n N E"]


def nsa_backend(
    implementation: str | None, query: Float[Array, "B n N D"], cache: NSACache
) -> Backend:
    """Chooses the backend of `attend` for queries of this shape.

    Raises:
      NotImplementedError: the named implementation cannot serve them.
    """
    _check_implementation(implementation)
    near = min(cache.config.window_size - 1, cache.capacity) + query.shape[1]
    tokens, windows, near = (
        _keys(cache, length) for length in (cache.capacity + query.shape[1], cache.windows, near)
    )
    # plans do not depend on the scale
    spec = NSASpec.of(cache.config, 1.0, packed=True)
    requests = spec.requests(query, (windows, windows), ((tokens, tokens), (near, near)))
    return resolve(NAME, implementation, *requests.values()).backend


def dense_backend(
    implementation: str | None,
    query: Float[Array, "B n N D"],
    cache: KVCache,
    *,
    window_size: int | None,
) -> Backend:
    """Chooses the backend of `attend_dense`; see `nsa_backend`."""
    _check_implementation(implementation)
    seen = cache.capacity
    if window_size is not None:
        seen = min(window_size - 1, cache.capacity) + query.shape[1]
    keys, spec = _keys(cache, seen), RangeSpec(scale=1.0, branch="full")
    return resolve("causal_attention", implementation, Request(spec, (query, keys, keys))).backend


def _check_implementation(implementation: str | None) -> None:
    if implementation in ("reference", *CUDNN):
        raise NotImplementedError(
            f"implementation={implementation!r} cannot serve a cache; use 'xla', 'triton' or None"
        )


def _keys(cache: KVCache, length: int) -> jax.ShapeDtypeStruct:
    shape = (cache.lengths.shape[0], length, *cache.key.shape[2:])
    return jax.ShapeDtypeStruct(shape, cache.key.dtype)


def attend(
    query: Float[Array, "B n N D"],
    cache: NSACache,
    chunk: Chunk,
    layer: int | Array,
    *,
    scale: float,
    backend: Backend,
) -> Branches:
    """The outputs of the three branches, for queries whose keys are already in the cache.

    Args:
      query: queries after RoPE.
      cache: a cache that already holds the keys and values of the chunk.
      chunk: positions of the queries.
      layer: number of the layer.
      scale: factor of the logits.
      backend: the result of `nsa_backend`.
    """
    if query.shape[1] > MAX_DECODE_TOKENS:
        return _prefill_chunk(query, cache, chunk, layer, scale, backend)

    def kernels(*args):
        from fsa_jax.inference import decode_step

        interpret = backend is Backend.TRITON_INTERPRET
        return Branches(*decode_step.attend(*args, scale=scale, interpret=interpret)[0])

    run = backend.runs(kernels, functools.partial(_decode_tokens, scale=scale))
    return run(query, cache, chunk, jnp.asarray(layer, jnp.int32))


def attend_dense(
    query: Float[Array, "B n N D"],
    cache: KVCache,
    chunk: Chunk,
    layer: int | Array,
    *,
    window_size: int | None,
    scale: float,
    backend: Backend,
) -> Float[Array, "B n N E"]:
    """Causal attention to all tokens of the sequences, or to the last `window_size` of them.

    The other arguments are as in `attend`; `backend` is the result of `dense_backend`.
    """
    pools, few = (cache.key, cache.value), query.shape[1] <= MAX_DECODE_TOKENS
    if window_size is not None:
        options: dict[str, Any] = {"window_size": window_size, "scale": scale}
        if few:
            return _window_of_few(query, pools, cache, chunk, layer, **options)
        return _window_of_many(query, pools, cache, chunk, layer, backend=backend, **options)
    capacity, first = cache.capacity, jnp.zeros_like(chunk.first)
    key, value = (cache.read(pool, layer, first, capacity, chunk.stop) for pool in pools)
    stop = jnp.where(chunk.valid, chunk.position + 1, 0)
    if few:
        return _dense(query, key, value, _until(stop, capacity), scale)[0]
    query_range = _query_range(
        jnp.arange(capacity, dtype=jnp.int32)[None] - chunk.first[:, None], chunk
    )
    spec = RangeSpec(backend=backend, scale=scale, branch="full")
    ranges = Ranges((jnp.zeros_like(stop), stop), query_range)
    return _range_attention(spec, query, key, value, ranges)[0]


# Compressed attention and the selection


class _Seen(NamedTuple):
    """The compressed keys and values of each sequence, and which of them its queries see."""

    key: Float[Array, "B M K D"]
    value: Float[Array, "B M K E"]
    segments: SegmentInfo
    windows: Windows


def _compressed(cache: NSACache, chunk: Chunk, layer) -> _Seen:
    stride = cache.config.kernel_stride
    key, value = cache.read_compressed(layer, chunk, cache.windows)
    # Token indices count from the chunk's first token, so the documents start before index 0.
    start = jnp.broadcast_to(-chunk.first[:, None], chunk.position.shape)
    end = jnp.broadcast_to((chunk.stop - chunk.first)[:, None], start.shape)
    visible = jnp.where(chunk.valid, cache.windows_before(chunk.position + 1), 0)
    place = jnp.arange(cache.windows, dtype=jnp.int32)[None] * stride - chunk.first[:, None]
    return _Seen(
        key,
        value,
        SegmentInfo(start, end, chunk.valid, packed=False),
        Windows(start=place, first=jnp.zeros_like(visible), visible=visible),
    )


# Few tokens


def _decode_tokens(query, cache: NSACache, chunk: Chunk, layer, *, scale: float) -> Branches:
    config = cache.config
    seen = _compressed(cache, chunk, layer)
    visible = _until(seen.windows.visible, cache.windows)
    compressed, lse = _dense(query, seen.key, seen.value, visible, scale)
    blocks = xla.select_blocks(
        query, seen.key, lse, seen.segments, seen.windows, config=config, scale=scale
    )
    selected = _listed(query, cache, chunk, layer, blocks, scale)
    options = {"window_size": config.window_size, "scale": scale}
    window = _window_of_few(query, cache.window_pools, cache, chunk, layer, **options)
    return Branches(compressed, selected, window)


def _until(stop: Int[Array, "B n"], count: int) -> Bool[Array, "B n m"]:
    """The mask of `count` keys that are before each query's `stop`."""
    return jnp.arange(count, dtype=jnp.int32)[None, None] < stop[..., None]


def _dense(query, key, value, visible: Bool[Array, "B n m"], scale):
    """Attention of a few queries to keys [B, m, K, D]: out [B, n, N, E] and lse [B, n, N]."""
    query = rearrange(query, "b n (k g) d -> b k n g d", k=key.shape[2])
    key, value = (rearrange(x, "b m k d -> b k m d") for x in (key, value))
    out, lse = _softmax(query, key, value, visible[:, None], scale)
    return rearrange(out, "b k n g e -> b n (k g) e"), rearrange(lse, "b k n g -> b n (k g)")


def _softmax(
    query: Float[Array, "B K n G D"],
    key: Float[Array, "B K m D"],
    value: Float[Array, "B K m E"],
    visible: Bool[Array, "B #K n m"],
    scale: float,
) -> tuple[Float[Array, "B K n G E"], Float[Array, "B K n G"]]:
    """Softmax attention; a query without visible keys gets out 0 and lse -inf."""
    logits = scale * einsum("bkngd,bkmd->bkngm", query, key)
    logits = jnp.where(visible[:, :, :, None], logits, -jnp.inf)
    top = logits.max(axis=-1)
    safe = jnp.where(jnp.isneginf(top), 0, top)
    weight = jnp.exp(logits - safe[..., None])
    total = weight.sum(axis=-1)
    out = einsum("bkngm,bkme->bknge", weight.astype(value.dtype), value)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, safe + jnp.log(total)).astype(accumulation_dtype(query))
    return (out / total[..., None]).astype(query.dtype), lse


def _listed(query, cache: NSACache, chunk: Chunk, layer, blocks: Int[Array, "B n K S"], scale):
    """Attention of a few queries to their listed blocks, which are gathered from their pages."""
    kv_heads, size = cache.key.shape[2], cache.page_size
    pages, head = cache.pages(layer), jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None, None]
    place = jnp.arange(size, dtype=jnp.int32)[None, None, None]

    def one(arrays):
        """One token of each sequence: query [B, K, G, D], blocks [B, K, S], position [B]."""
        query, blocks, position = arrays
        batch = blocks.shape[0]
        listed = jnp.maximum(blocks, 0).reshape(batch, -1)
        page = jnp.take_along_axis(pages, listed, axis=1).reshape(*blocks.shape, 1)
        token = blocks[..., None] * size + place
        visible = (blocks[..., None] >= 0) & (token <= position[:, None, None, None])

        def gather(pool):
            # entries that the query cannot see may be left over from another sequence, such as NaN
            x = jnp.where(visible[..., None], pool[page, place, head], 0)
            return rearrange(x, "b k s p d -> b k (s p) d")

        key, value = gather(cache.key), gather(cache.value)
        sees = rearrange(visible, "b k s p -> b k 1 (s p)")
        return _softmax(query[:, :, None], key, value, sees, scale)[0][:, :, 0]

    query = rearrange(query, "b n (k g) d -> n b k g d", k=kv_heads)
    position = jnp.where(chunk.valid, chunk.position, -1).T
    arrays = (query, rearrange(blocks, "b n k s -> n b k s"), position)
    together = max(1, _GATHERED // query.shape[1])
    out = jax.lax.map(one, arrays, batch_size=together)
    return rearrange(out, "n b k g e -> b n (k g) e")


# The sliding window


def _window_of_few(query, pools, cache: KVCache, chunk: Chunk, layer, *, window_size, scale):
    """Attention of a few queries to the last `window_size` tokens in these pools."""
    reach = min(window_size - 1, cache.capacity)
    key, value = _nearby(pools, cache, chunk, layer, reach)
    low, high = _window(chunk, reach, window_size)
    column = jnp.arange(key.shape[1], dtype=jnp.int32)[None, None]
    visible = (column >= low[..., None]) & (column < high[..., None])
    return _dense(query, key, value, visible, scale)[0]


def _window_of_many(
    query, pools, cache: KVCache, chunk: Chunk, layer, *, window_size, scale, backend
):
    """Like `_window_of_few`, by the operations of training."""
    reach = min(window_size - 1, cache.capacity)
    key, value = _nearby(pools, cache, chunk, layer, reach)
    place = jnp.arange(key.shape[1], dtype=jnp.int32)[None] - reach
    first, last = _query_range(jnp.broadcast_to(place, (query.shape[0], place.shape[1])), chunk)
    last = jnp.clip(place + min(window_size, key.shape[1]), first, last)
    ranges = Ranges(_window(chunk, reach, window_size), (first, last))
    spec = RangeSpec(backend=backend, scale=scale, branch="window")
    return _range_attention(spec, query, key, value, ranges)[0]


def _nearby(pools, cache: KVCache, chunk: Chunk, layer, reach: int):
    """Keys and values from `reach` tokens before the chunk to its end, [B, reach + n, K, ...]."""
    count = reach + chunk.position.shape[1]
    return tuple(cache.read(x, layer, chunk.first - reach, count, chunk.stop) for x in pools)


def _window(chunk: Chunk, reach: int, window_size: int):
    """The range of each query's sliding window, in indices of the tokens of `_nearby`."""
    oldest = jnp.maximum(chunk.position - (window_size - 1), 0)
    low = oldest - chunk.first[:, None] + reach
    high = chunk.position + 1 - chunk.first[:, None] + reach
    return low, jnp.where(chunk.valid, high, low)


# Many tokens


def _prefill_chunk(query, cache: NSACache, chunk: Chunk, layer, scale: float, backend) -> Branches:
    config, static = cache.config, {"backend": backend, "scale": scale}
    seen = _compressed(cache, chunk, layer)
    visible = segments.visible_windows(seen.windows)
    # queries see a window from its last token on
    query_range = _query_range(seen.windows.start + (config.kernel_size - 1), chunk)
    spec, ranges = RangeSpec(**static, branch="compressed"), Ranges(visible, query_range)
    compressed, lse = _range_attention(spec, query, seen.key, seen.value, ranges)
    spec = SelectionSpec(**static, config=config, packed=seen.segments.packed)
    blocks = choose_blocks(spec, query, seen.key, lse, seen.segments, seen.windows)
    selected = _listed_in_row(query, cache, chunk, layer, blocks, static)
    window = _window_of_many(
        query,
        cache.window_pools,
        cache,
        chunk,
        layer,
        window_size=config.window_size,
        **static,
    )
    return Branches(compressed, selected, window)


def _query_range(place: Int[Array, "B m"], chunk: Chunk) -> tuple[Array, Array]:
    """The range of queries at or after each place, counted from the chunk's first token.

    The range is empty where the place is before the start of the sequence.
    """
    added = (chunk.stop - chunk.first)[:, None]
    there = place >= -chunk.first[:, None]
    return jnp.where(there, jnp.clip(place, 0, added), 0), jnp.where(there, added, 0)


def _listed_in_row(query, cache: NSACache, chunk: Chunk, layer, blocks, static):
    """Attention of many queries to listed blocks, in a contiguous copy of each sequence's tokens.

    In the copy the chunk starts at token `capacity` for every sequence, and the cached tokens of
    the sequence immediately precede it.
    """
    size, begin = cache.page_size, cache.capacity
    length = begin + query.shape[1]
    first = chunk.first - begin
    key, value = (
        cache.read(pool, layer, first, length, chunk.stop) for pool in (cache.key, cache.value)
    )
    token = first[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    there = (token >= 0) & (token < chunk.stop[:, None])
    segment_info = segments.describe_segments(there.astype(jnp.int32), *there.shape)
    first = first[:, None, None, None]
    block_starts = jnp.where(blocks >= 0, blocks * size - first, length)
    spec = BlockSpec(**static, block_size=size, packed=True)
    offset = jnp.full((query.shape[0], 1), begin, jnp.int32)
    lists = Lists(block_starts, segment_info.start, segment_info.end, segment_info.valid, offset)
    return _block_attention(spec, query, key, value, lists)[0]
