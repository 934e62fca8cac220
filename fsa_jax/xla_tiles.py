"""The arithmetic of one tile of the portable implementation: some queries against some keys.

Rows of a tile that belong to no visible pair are set to zero before use, so that NaN and Inf in
padding or in unselected blocks can reach neither outputs nor gradients.

Shapes: H pairs of a sequence and a KV head, Q queries of the tile, G query heads of a key head, M
keys of the tile, D and E head widths.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from fsa_jax.semantics.precision import accumulation_dtype, einsum

# A matmul on a CPU may add up its float32 products sequentially. Its error then grows with their
# number, and grows a third faster in a tile that fills the vector registers than in one of odd
# length. So each sum is split into at least two parts, of at most SUM_PART products each.
SUM_PART = 16


def empty_state(query: Array, width: int):
    """The state of the online softmax before the first tile: (max, sum, unnormalised out).

    It is made by zeros_like(query), so that under shard_map it varies over the same mesh axes as
    the query.
    """
    shape, wide = query.shape[:3], accumulation_dtype(query)
    total = jnp.zeros_like(query, wide, shape=shape)
    return total - jnp.inf, total, jnp.zeros_like(query, wide, shape=(*shape, width))


def _hide(visible: Bool[Array, "H Q M"], axis: int, *arrays: Array) -> tuple[Array, ...]:
    """Zeroes the rows of arrays [H, Q or M, ...] that belong to no visible pair."""
    keep = visible.any(axis=axis)
    return tuple(jnp.where(keep.reshape(*keep.shape, *(1,) * (x.ndim - 2)), x, 0) for x in arrays)


def _products(equation: str, axis: str, x: Array, y: Array) -> Array:
    """Computes `einsum` over the common axis of two arrays; float32 is summed in parts."""
    subscripts, result = equation.split("->")
    subscripts = subscripts.split(",")
    places = [axes.index(axis) for axes in subscripts]
    size = x.shape[places[0]]
    part = min(SUM_PART, -(-size // 2))
    if x.dtype != jnp.float32 or size < 4:
        return einsum(equation, x, y)

    def cut(x, place):
        missing = -size % part
        x = jnp.pad(x, [(0, missing if i == place else 0) for i in range(x.ndim)])
        return x.reshape(*x.shape[:place], -1, part, *x.shape[place + 1 :])

    parts = [cut(array, place) for array, place in zip((x, y), places, strict=True)]
    subscripts = ",".join(axes.replace(axis, f"z{axis}") for axes in subscripts)
    return einsum(f"{subscripts}->z{result}", *parts).sum(axis=0)


def merge(state, query, key, value, visible, scale):
    """One step of the online softmax: merges a tile of keys into (max, sum, unnormalised out)."""
    *softmax, out = state
    (query,) = _hide(visible, 2, query)
    key, value = _hide(visible, 1, key, value)
    softmax, weight, decay = _softmax_step(softmax, query, key, visible, scale)
    part = _products("hqgm,hme->hqge", "m", weight.astype(value.dtype), value)
    return *softmax, out * decay[..., None] + part


def _softmax_step(state, query, key, visible, scale):
    """The new (max, sum), the weights of the tile's keys, and the factor that rescales old sums."""
    top, total = state
    logits = scale * _products("hqgd,hmd->hqgm", "d", query, key)
    logits = jnp.where(visible[:, :, None], logits, -jnp.inf)
    new_top = jnp.maximum(top, logits.max(axis=-1))
    safe = jnp.where(jnp.isneginf(new_top), 0, new_top)
    weight = jnp.exp(logits - safe[..., None])
    decay = jnp.exp(top - safe)
    return (new_top, total * decay + weight.sum(axis=-1)), weight, decay


def finish(top, total, out, dtype):
    """Normalises the output. A query without visible keys gets out 0 and lse -inf."""
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return (out / total[..., None]).astype(dtype), lse


def merge_delta(state, query, key, value, cotangent, visible, scale):
    """Like `merge`, but accumulates sum(p * dp), with p and dp as in `tile_gradients`."""
    *softmax, weighted = state
    query, cotangent = _hide(visible, 2, query, cotangent)
    key, value = _hide(visible, 1, key, value)
    softmax, weight, decay = _softmax_step(softmax, query, key, visible, scale)
    dp = _products("hqge,hme->hqgm", "e", cotangent, value)
    return *softmax, weighted * decay + (weight * dp).sum(axis=-1)


def row_numbers(query, lse, delta, dlse, recompute):
    """The numbers of each query that `tile_gradients` needs, [H, T, G] each.

    The saved logsumexp and delta = sum(out * dout) - dlse carry rounding errors. These are
    negligible for 16-bit gradients. In float32 they made the error of dk 4 times that of dense
    attention, mostly through the first queries of a document: where ds = p * (dp - delta) is nearly
    0, delta must be rounded in the same way as dp. So for wider dtypes `recompute` runs
    `merge_delta` over all keys, starting from the state it is given.
    """
    zeros = jnp.zeros_like(lse)
    if query.dtype != lse.dtype:
        return lse, zeros + 1, delta, zeros
    top, total, weighted = recompute((zeros - jnp.inf, zeros, zeros))
    return top, total, weighted / jnp.where(total == 0, 1, total), dlse


def tile_gradients(query, key, value, cotangent, rows, visible, scale):
    """Gradients (dq, dk, dv) of one tile, with dp = do v^T and ds = p * (dp - delta + dlse).

    `rows` = (top, total, delta, dlse) hold one number for each query, and
    p = exp(logits - top) / total.
    """
    query, cotangent = _hide(visible, 2, query, cotangent)
    key, value = _hide(visible, 1, key, value)
    top, total, delta, dlse = (x[..., None] for x in _hide(visible, 2, *rows))
    logits = scale * _products("hqgd,hmd->hqgm", "d", query, key)
    p = jnp.where(visible[:, :, None], jnp.exp(logits - top), 0) / jnp.where(total == 0, 1, total)
    dp = _products("hqge,hme->hqgm", "e", cotangent, value)
    ds = (scale * p * (dp - delta + dlse)).astype(key.dtype)
    dq = _products("hqgm,hmd->hqgd", "m", ds, key)
    # The group is summed last. A single matmul over queries and heads would add up G times as many
    # float32 terms sequentially; on a GPU its error reached 4.6 times that of dense attention.
    dk = _products("hqgm,hqgd->hgmd", "q", ds, query).sum(axis=1)
    dv = _products("hqgm,hqge->hgme", "q", p.astype(value.dtype), cotangent).sum(axis=1)
    return dq, dk, dv
