"""The branches of one call, joined: what `native_sparse_attention` and the layer share.

The public functions of `api.py` are for one branch alone. Together, the backward pass of a branch
takes from the gates what it would else compute from its output (`gating.py`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fsa_jax import context, gating, operators, reference, triton
from fsa_jax.arguments import checks
from fsa_jax.dispatch import choose, mode_of, mode_over_tokens
from fsa_jax.operators import Call
from fsa_jax.semantics.precision import wide_dtype
from fsa_jax.semantics.segments import describe_rows


def gated_attention(
    query, compressed, sources, gates, *, config, scale, segment_ids, implementation, sequence_axis
) -> Any:  # fmt: skip
    """`native_sparse_attention`, perhaps with other keys and values for the window.

    `sources` are one pair of them for the selected branch and the window, or a pair for each.
    """
    pairs = [checks.attention_arrays(query, *pair)[1:3] for pair in sources]
    key, value = compressed
    stride = config.kernel_stride
    query, *windows, has_batch = checks.attention_arrays(query, key, value, stride)
    gates = checks.gates(gates, query, has_batch)
    if gates.dtype == jnp.float64:  # the sum has no such numbers, and no kernel has
        gates = gates.astype(wide_dtype(query))
    scale = checks.scale(scale, query.shape[-1])
    ids = checks.ids(segment_ids, query.shape[:2], has_batch)
    rows = describe_rows(ids, *query.shape[:2])
    gates = rows.without_padding(gates)  # the branches see to their own arguments
    reasons = {
        "compressed_attention": triton.range_reason(query, *windows, implementation=implementation),
        "selected_attention": triton.selected_reason(
            query, *pairs[0], block_size=config.block_size
        ),
        "sliding_window_attention": triton.range_reason(
            query, *pairs[-1], implementation=implementation
        ),
    }
    if sequence_axis is not None:
        checks.sequence(sequence_axis, has_batch, query.shape[1], stride)
        reason = triton.select_reason(query, windows[0], config)
        reason = next(filter(None, (reason, *reasons.values())), None)
        name = "native_sparse_attention"
        mode = mode_over_tokens(name, implementation, reason, sequence_axis)
        return context.attention(
            query,
            tuple(windows),
            pairs,
            gates,
            ids,
            config=config,
            scale=scale,
            mode=mode,
            axis=sequence_axis,
        )
    by_name = {name: mode_of(name, implementation, reason) for name, reason in reasons.items()}
    exact = implementation == "reference"
    attend = {
        name: getattr(reference, name)
        if exact
        else functools.partial(getattr(operators, name), mode=mode, gated=True)
        for name, mode in by_name.items()
    }
    out, lse = attend["compressed_attention"](
        query,
        *windows,
        rows,
        kernel_size=config.kernel_size,
        kernel_stride=config.kernel_stride,
        scale=scale,
    )
    indices = choose_blocks(query, windows[0], lse, rows, config, scale, implementation)
    selected, selected_lse = attend["selected_attention"](
        query, *pairs[0], indices, rows, block_size=config.block_size, scale=scale
    )
    window, window_lse = attend["sliding_window_attention"](
        query, *pairs[-1], rows, window_size=config.window_size, scale=scale
    )
    outs = (out, selected, window)
    total: Any
    if exact:
        total = gating.combine(gates, outs)
    else:
        call = Call(by_name["sliding_window_attention"], scale)
        total = gating.gated_sum(call, gates, outs, (lse, selected_lse, window_lse))
    return total if has_batch else total[0]


def choose_blocks(query, key, lse, rows, config, scale, implementation) -> jax.Array:
    """`select_blocks` of canonical arrays."""
    query, key, lse = jax.lax.stop_gradient((query, key, lse))
    serve = choose("select_blocks", implementation, triton.select_reason(query, key, config))
    indices = serve(query, key, lse, rows, config=config, scale=scale)
    return checkpoint_name(indices, "block_indices")
