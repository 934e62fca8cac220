"""Compares results with a dense computation of a sample of queries and keys, before any timing.

The output and dq of a query depend on no other query, and dK and dV of a key depend on all queries
but on no other key. So a sample of queries and keys can be checked at any length, in float32, from
the definition. The contribution of all queries to a key uses the logsumexp and the output under
test, which the sampled queries have verified.

Shapes: T tokens, N query heads, K key/value heads, n sampled queries or keys, M keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array

from fsa_jax import NSAConfig
from fsa_jax.bench.cases import Case, Subject
from fsa_jax.semantics.segments import describe_segments, describe_windows

#: The number of sampled queries, and of sampled keys.
SAMPLE = 32
#: The largest allowed error, relative to the root mean square: twice the error of bfloat16
#: gradients for very similar keys. Results of faulty code are off by far more.
TOLERANCE = 0.05
#: The least share of sampled queries whose selected blocks must be correct. Near ties may differ,
#: since bfloat16 kernels and the check add in different orders.
RIGHT_CHOICES = 0.95
#: These functions run once for each shape: autotuning their matrix products took 15 s of each case.
_jit = functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})


class WrongResult(ArithmeticError):
    """A result differs from the definition."""


def check(case: Case, subject: Subject, arrays, out, lse, cotangent, gradients) -> float | None:
    """The largest relative error in a sample of the results; None: nothing to compare.

    Args:
      case: the shape.
      subject: the function that was run.
      arrays: the inputs made by `cases.make_inputs`.
      out: the output [1, T, N, D].
      lse: the logsumexp [1, T, N]; None for full attention, whose dK and dV are not checked.
      cotangent: the cotangent of `out`.
      gradients: the gradients of query, key and value.
    """
    if subject.function == "native_sparse_attention":
        return _check_operator(case, arrays, out, cotangent, gradients)
    if subject.differentiated[:1] != ("query",):
        return None
    query, key, value = (arrays[name][0] for name in subject.differentiated)
    rows, keys = _sample(query.shape[0]), _sample(key.shape[0])
    see = functools.partial(visible, case, subject.function, arrays)
    every = jnp.arange(query.shape[0], dtype=jnp.int32)
    found = [out[0, rows], gradients[0][0, rows]]
    seen = see(rows, jnp.arange(key.shape[0], dtype=jnp.int32))
    wanted = list(_rows(query[rows], key, value, cotangent[0, rows], seen))
    if lse is not None:
        found += [x[0, keys] for x in gradients[1:]]
        wanted += _keys(
            query, key[keys], value[keys], cotangent[0], out[0], lse[0], see(every, keys)
        )
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


def _check_operator(case: Case, arrays, out, cotangent, gradients) -> float | None:
    """Like `check` for the whole operator: its output and dq, if it selects blocks by scores."""
    if case.selection != "nsa":
        return None
    rows = _sample(case.length)
    gates = arrays["gates"][0, rows].astype(jnp.float32)
    wanted_out, wanted_dq = jnp.zeros(()), jnp.zeros(())
    for number, (function, prefix) in enumerate(
        (
            ("compressed_attention", "compressed_"),
            ("selected_attention", ""),
            ("sliding_window_attention", ""),
        )
    ):
        key, value = (arrays[f"{prefix}{name}"][0] for name in ("key", "value"))
        seen = visible(case, function, arrays, rows, jnp.arange(key.shape[0], dtype=jnp.int32))
        gate = gates[..., number, None]
        dout = gate * cotangent[0, rows].astype(jnp.float32)
        branch, dquery = _rows(arrays["query"][0, rows], key, value, dout, seen)
        wanted_out, wanted_dq = wanted_out + gate * branch, wanted_dq + dquery
    pairs = ((out[0, rows], wanted_out), (gradients[0][0, rows], wanted_dq))
    return max(relative_error(got, wanted) for got, wanted in pairs)


def _sample(size: int) -> Array:
    """A sample of the numbers below `size`, including the last one."""
    numbers = np.random.default_rng(0).integers(0, size, SAMPLE)
    return jnp.asarray(np.unique(np.append(numbers, size - 1)), jnp.int32)


def relative_error(got, wanted) -> float:
    """The root mean square of the difference, relative to that of `wanted`; 0 if both are 0."""
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    size = np.sqrt(np.mean(wanted**2))
    error = np.sqrt(np.mean((got - wanted) ** 2))
    return float(error / size) if size else float(error > 0)


@functools.partial(_jit, static_argnums=(0, 1))
def visible(case: Case, function: str, arrays, rows: Array, keys: Array) -> Array:
    """The mask of the keys that the queries `rows` see, by definition: bool [K or 1, n, M]."""
    segments = describe_segments(arrays.get("segment_ids"), 1, case.length)
    config, start = case.config, segments.start[0, rows][:, None]
    token, key = rows[:, None], keys[None]
    if function == "compressed_attention":
        first = describe_windows(segments, config.kernel_size, config.kernel_stride).start[0, key]
        ended = first + config.kernel_size - 1 <= token
        return ((first >= start) & ended & segments.valid[0, token])[None]
    seen = (key <= token) & (key >= start) & segments.valid[0, token]
    if function == "sliding_window_attention":
        seen &= token - key < config.window_size
    if function != "selected_attention":
        return seen[None]
    lists = rearrange(arrays["block_indices"][0, rows], "n k s -> k n 1 s")
    block = (key - start) // config.block_size
    return (block[None, :, :, None] == lists).any(axis=-1) & seen[None]


@_jit
def _rows(query, key, value, cotangent, seen):
    """The output and dq of some queries."""

    def attend(query):
        logits = _logits(query, key)
        logits = jnp.where(seen[:, None], logits, -jnp.inf)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weight = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0, jax.lax.stop_gradient(top)))
        total = weight.sum(axis=-1, keepdims=True)
        p = weight / jnp.where(total == 0, 1, total)
        out = jnp.einsum("kgns,ske->nkge", p, value.astype(jnp.float32), precision="highest")
        return rearrange(out, "n k g e -> n (k g) e")

    out, pullback = jax.vjp(attend, query.astype(jnp.float32))
    return out, pullback(cotangent.astype(jnp.float32))[0]


@_jit
def _keys(query, key, value, cotangent, out, lse, seen):
    """The gradients dK and dV of some keys."""
    cotangent = cotangent.astype(jnp.float32)
    delta = jnp.sum(out.astype(jnp.float32) * cotangent, axis=-1)
    heads = functools.partial(rearrange, pattern="t (k g) -> k g t 1", k=key.shape[1])
    p = jnp.where(seen[:, None], jnp.exp(_logits(query, key) - heads(lse)), 0)
    grouped = functools.partial(rearrange, pattern="t (k g) d -> t k g d", k=key.shape[1])
    product = functools.partial(jnp.einsum, precision="highest")
    dp = product("tkge,ske->kgts", grouped(cotangent), value.astype(jnp.float32))
    ds = p * (dp - heads(delta)) * query.shape[-1] ** -0.5
    dkey = product("kgts,tkgd->skd", ds, grouped(query.astype(jnp.float32)))
    return dkey, product("kgts,tkge->ske", p, grouped(cotangent))


def _logits(query, key):
    """The scaled logits, float32 [K, G, T, M]."""
    query = rearrange(query.astype(jnp.float32), "t (k g) d -> t k g d", k=key.shape[1])
    logits = jnp.einsum("tkgd,skd->kgts", query, key.astype(jnp.float32), precision="highest")
    return logits * query.shape[-1] ** -0.5


def check_blocks(case: Case, arrays, lists: Array) -> float:
    """The share of sampled queries whose list of blocks is correct by the definition.

    The list must contain the forced blocks, and no block outside it may have a higher score than a
    chosen one by more than rounding.
    """
    config = case.config
    sample = _sample(case.length)
    rows = np.asarray(sample)
    slots = jnp.arange(arrays["compressed_key"].shape[1], dtype=jnp.int32)
    seen = visible(case, "compressed_attention", arrays, sample, slots)
    logits = _jit(_logits)(arrays["query"][0, sample], arrays["compressed_key"][0])
    lse = rearrange(arrays["lse"][0, sample], "n (k g) -> k g n 1", k=case.kv_heads)
    p = np.asarray(jnp.where(seen[:, None], jnp.exp(logits - lse), 0).sum(axis=1), np.float64)
    segments = describe_segments(arrays.get("segment_ids"), 1, case.length)
    start = np.asarray(segments.start[0])[rows]
    first = np.asarray(
        describe_windows(segments, config.kernel_size, config.kernel_stride).start[0]
    )
    right = []
    for n, row in enumerate(rows):
        own = (row - start[n]) // config.block_size
        block = np.arange(own + 1)
        unit = (first - start[n]) // config.kernel_stride
        begin = np.maximum(unit[:, None], block * (config.block_size // config.kernel_stride))
        end = np.minimum(
            unit[:, None] + config.kernel_size // config.kernel_stride,
            (block + 1) * (config.block_size // config.kernel_stride),
        )
        score = p[:, n] @ np.maximum(end - begin, 0)
        of_row = np.asarray(lists)[0, row]
        right += [right_list(score[k], of_row[k], own, config) for k in range(case.kv_heads)]
    return float(np.mean(right))


def right_list(score, chosen, own: int, config: NSAConfig) -> bool:
    """Whether a list of blocks is correct for the scores [own + 1] of one query and head."""
    block = np.arange(own + 1)
    forced = (block < config.init_blocks) | (block > own - config.local_blocks)
    chosen = chosen[chosen >= 0]
    count = min(own + 1, config.topk)
    among = np.isin(block, chosen)
    good = len(set(chosen.tolist())) == count and bool(np.all(np.diff(chosen) > 0))
    good = good and among.sum() == count and bool(np.all(among[forced]))
    if good and count <= own:
        least = np.where(forced, np.inf, score)[among].min()
        good = score[~among].max() <= least * (1 + 1e-4) + 1e-30
    return bool(good)
