"""Native sparse attention as the paper defines it, with dense masks and no tiling.

This file is meant to be read beside arXiv 2502.11089 (NSA), and is the oracle of the tests. It
needs memory quadratic in T. Logits and softmax are float32, or float64 for float64 inputs.

Shapes: B batch, T tokens, N query heads, K key/value heads, G = N/K heads in a group, D head width
of query and key, E of value, S listed blocks, M window slots, l kernel_size, d kernel_stride.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from fsa_jax.config import NSAConfig
from fsa_jax.semantics.precision import accumulation_dtype, einsum, narrow
from fsa_jax.semantics.segments import SegmentInfo, describe_windows


def compress(
    x: Float[Array, "B T K D"],
    segments: SegmentInfo,
    *,
    kernel_size: int,
    kernel_stride: int,
    method: str,
    weights: Any = None,
    positions: Float[Array, "K l D"] | None = None,
) -> Float[Array, "B M K D"]:
    """Phi of every window (NSA eq. 7): maps its l tokens, plus `positions`, to one."""
    windows = describe_windows(segments, kernel_size, kernel_stride)
    token = windows.start[:, :, None] + jnp.arange(kernel_size, dtype=jnp.int32)[None, None]
    exists = (windows.start < x.shape[1])[:, :, None, None]
    tokens = jax.vmap(lambda row, index: row.at[index].get(mode="fill", fill_value=0))(x, token)
    tokens = rearrange(tokens, "b m l k d -> b m k l d").astype(accumulation_dtype(x))
    if positions is not None:
        tokens = tokens + positions.astype(tokens.dtype)[None, None]
    if method == "mean":
        out = tokens.mean(axis=3)
    elif method == "weighted":
        out = einsum("bmkld,kl->bmkd", tokens, weights.astype(tokens.dtype))
    elif method == "linear":
        flat = rearrange(tokens, "b m k l d -> b m k (l d)")
        out = einsum("bmki,kid->bmkd", flat, weights.astype(tokens.dtype))
    else:
        w_in, w_out = (w.astype(tokens.dtype) for w in weights)
        flat = rearrange(tokens, "b m k l d -> b m k (l d)")
        hidden = jax.nn.gelu(einsum("bmki,kih->bmkh", flat, w_in))
        out = einsum("bmkh,khd->bmkd", hidden, w_out)
    return jnp.where(exists, out, 0).astype(x.dtype)


def compressed_attention(
    query, key, value, segments: SegmentInfo, *, kernel_size, kernel_stride, scale
):
    """Attention to the compressed windows that end at or before the query (NSA eq. 7)."""
    sees = _sees_window(segments, kernel_size, kernel_stride)
    return _attend(query, key, value, sees[:, None], scale)


@narrow
def select_blocks(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B M K D"],
    lse: Float[Array, "B T N"],
    segments: SegmentInfo,
    *,
    config: NSAConfig,
    scale: float,
) -> Int[Array, "B T K S"]:
    """Selects the topk blocks of each query and KV head (NSA eq. 8 to 12)."""
    sees = _sees_window(segments, config.kernel_size, config.kernel_stride)
    logits = _logits(query, key, scale)
    lse = rearrange(lse, "b t (k g) -> b k g t 1", k=key.shape[2])
    lse = jnp.where(jnp.isneginf(lse), 0, lse).astype(logits.dtype)
    p = jnp.where(sees[:, None, None], jnp.exp(logits - lse), 0).sum(axis=2)  # [B, K, T, M]

    # In units of d tokens, window i covers [i, i + l/d) and block j covers [j*b/d, (j+1)*b/d).
    stride, per_block = config.kernel_stride, config.block_size // config.kernel_stride
    windows = describe_windows(segments, config.kernel_size, stride)
    unit = (windows.start[:, None, :] - segments.start[:, :, None])[..., None] // stride
    block = jnp.arange(config.num_blocks(query.shape[1]), dtype=jnp.int32)
    last = jnp.minimum(
        unit + config.kernel_size // stride, ((block + 1) * per_block)[None, None, None]
    )
    shared = jnp.maximum(last - jnp.maximum(unit, (block * per_block)[None, None, None]), 0)
    score = einsum("bktm,btmj->btkj", p, shared.astype(p.dtype))

    own = (segments.position // config.block_size)[:, :, None]
    candidate = segments.valid[:, :, None] & (block[None, None] <= own)
    forced = (block < config.init_blocks)[None, None] | (
        block[None, None] > own - config.local_blocks
    )
    rank = jnp.where(candidate, jnp.where(forced, 2, 1), 0)[:, :, None, :]
    rank, block = jnp.broadcast_to(rank, score.shape), jnp.broadcast_to(block, score.shape)
    best = jnp.lexsort((block, -score, -rank), axis=-1)[..., : config.topk]
    # Blocks that may not be chosen go to the tail: they are numbered past all others, sorted, and
    # then replaced by -1.
    chosen = jnp.where(jnp.take_along_axis(rank, best, axis=-1) > 0, best, score.shape[-1])
    chosen = jnp.sort(chosen, axis=-1).astype(jnp.int32)
    chosen = jnp.where(chosen < score.shape[-1], chosen, -1)
    missing = config.topk - chosen.shape[-1]
    return jnp.pad(chosen, ((0, 0), (0, 0), (0, 0), (0, missing)), constant_values=-1)


def selected_attention(
    query, key, value, block_indices, segments: SegmentInfo, *, block_size, scale
):
    """Attention to the tokens of the listed blocks up to the query (NSA eq. 10)."""
    block = (segments.token[:, None, :] - segments.start[:, :, None]) // block_size  # [B, T, T]
    listed = (block[:, :, None, :, None] == block_indices[:, :, :, None, :]).any(axis=-1)
    sees = rearrange(listed, "b t k s -> b k t s") & _sees_token(segments)[:, None]
    return _attend(query, key, value, sees, scale)


def sliding_window_attention(query, key, value, segments: SegmentInfo, *, window_size, scale):
    """Attention to the last `window_size` tokens up to the query."""
    near = (segments.token[:, :, None] - segments.token[:, None, :]) < window_size
    return _attend(query, key, value, (_sees_token(segments) & near)[:, None], scale)


def _sees_token(segments: SegmentInfo) -> Bool[Array, "B T T"]:
    """The causal mask within each document; padding neither sees nor is seen."""
    query, key = segments.token[:, :, None], segments.token[:, None, :]
    return segments.valid[:, :, None] & (key <= query) & (key >= segments.start[:, :, None])


def _sees_window(
    segments: SegmentInfo, kernel_size: int, kernel_stride: int
) -> Bool[Array, "B T M"]:
    start = describe_windows(segments, kernel_size, kernel_stride).start[:, None, :]
    ended = start + (kernel_size - 1) <= segments.token[:, :, None]
    return segments.valid[:, :, None] & (start >= segments.start[:, :, None]) & ended


def _logits(query, key, scale) -> Float[Array, "B K G T S"]:
    query = rearrange(query, "b t (k g) d -> b t k g d", k=key.shape[2])
    return scale * einsum("btkgd,bskd->bkgts", query, key)


def _attend(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K E"],
    sees: Bool[Array, "B #K T S"],
    scale: float,
) -> tuple[Float[Array, "B T N E"], Float[Array, "B T N"]]:
    """Softmax attention under a mask; a query without visible keys gets 0 and lse -inf."""
    # Keys that no query sees and queries that see no key are set to 0 in both directions, so that a
    # NaN in them cannot reappear as 0 * NaN.
    seen = rearrange(sees.any(axis=2), "b k s -> b s k 1")
    key, value = jnp.where(seen, key, 0), jnp.where(seen, value, 0)
    sighted = rearrange(sees.any(axis=3), "b k t -> b t k 1")
    sighted = jnp.broadcast_to(sighted, (*sighted.shape[:2], key.shape[2], 1))
    sighted = jnp.repeat(sighted, query.shape[2] // key.shape[2], axis=2)
    logits = _logits(jnp.where(sighted, query, 0), key, scale)
    logits = jnp.where(sees[:, :, None], logits, -jnp.inf)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True, initial=-jnp.inf))
    weight = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0, top))
    total = weight.sum(axis=-1, keepdims=True)
    empty = total == 0
    p = weight / jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))
    out = einsum(
        "bkgts,bske->btkge",
        p.astype(value.dtype),
        value,
    )
    out = rearrange(out, "b t k g e -> b t (k g) e").astype(query.dtype)
    out = jnp.where(sighted, out, 0)
    return out, rearrange(lse, "b k g t 1 -> b t (k g)")
