"""The Pallas-Triton kernels of block selection, called without the operation around them."""

import dataclasses

from fsa_jax.pallas.block_selection.passes import select_blocks
from fsa_jax.pallas.block_selection.plan import make_plan
from fsa_jax.pallas.support import supported
from fsa_jax.semantics.segments import describe_segments, describe_windows

SCALE = 0.3


def kernel(query, key, lse, segment_ids, config, interpret=True, capability=90, **sizes):
    """Lists that the kernels select; `sizes` replace fields of the plan."""
    rows = describe_segments(segment_ids, *query.shape[:2])
    plan = supported(make_plan(query, key, config, capability=capability))
    return select_blocks(
        query,
        key,
        lse,
        rows,
        describe_windows(rows, config.kernel_size, config.kernel_stride),
        config=config,
        scale=SCALE,
        plan=dataclasses.replace(plan, **sizes),
        interpret=interpret,
    )
