"""The public functions: they canonicalise and check arguments, ask for a backend, and call it.

Data goes from here to `fsa_jax.ops`, or with a `sequence_axis` to `fsa_jax.sequence_parallel`; this
package computes nothing itself. `fsa_jax.ops.dispatch.resolve` decides once per call, before
anything is computed, which backend serves it. The batch axis may always be left out, from all
arrays of a call together.
"""

from fsa_jax.api.causal import causal_attention
from fsa_jax.api.compression import compress
from fsa_jax.api.one_branch import (
    compressed_attention,
    selected_attention,
    sliding_window_attention,
)
from fsa_jax.api.operator import combine_branches, native_sparse_attention
from fsa_jax.api.selection import select_blocks
from fsa_jax.ops.call import CHECKPOINT_NAMES

__all__ = [
    "CHECKPOINT_NAMES",
    "causal_attention",
    "combine_branches",
    "compress",
    "compressed_attention",
    "native_sparse_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]
