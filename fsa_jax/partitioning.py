"""Which axis of a parameter may be split over a mesh, by name."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from flax.core import spmd

LOGICAL_AXES = ("layers", "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp")
"""Names that the axes of parameters may carry; an axis that is never worth splitting has None."""


@contextlib.contextmanager
def sharding_rules(**mesh_axes: str | tuple[str, ...] | None) -> Iterator[None]:
    """Binds the logical axes of parameters to axes of a mesh, for as long as the context lasts.

    Within it ``nnx.get_partition_spec`` and ``nnx.get_named_sharding`` give mesh axes, and a module
    that is built under ``jax.set_mesh`` is sharded at once. Names left out are not split. The mesh
    needs axes of type ``Auto``.

    Args:
      **mesh_axes: for a name of ``LOGICAL_AXES`` the mesh axis (or axes) that splits it.

    Raises:
      ValueError: a name is not in ``LOGICAL_AXES``.

    Example:
      >>> from fsa_jax.layers import NativeSparseAttention
      >>> layer = NativeSparseAttention(num_heads=4, in_features=32, rngs=nnx.Rngs(0))
      >>> with sharding_rules(heads="model", embed="data"):
      ...     tuple(nnx.get_partition_spec(nnx.state(layer)).query.kernel.get_value())
      ('data', 'model', None)
    """
    for name in mesh_axes:
        if name not in LOGICAL_AXES:
            raise ValueError(f"a logical axis must be one of {LOGICAL_AXES}, got {name!r}")
    with nnx.logical_axis_rules(tuple((name, mesh_axes.get(name)) for name in LOGICAL_AXES)):
        yield


def partitioned(*names: str | None) -> dict[str, Any]:
    """Metadata of a parameter whose axes carry these logical names."""
    # Flax shards at construction and raises where no mesh is set. Here a layer can be built
    # anywhere: it is sharded at once only where there are a mesh and rules to do it by.
    ready = bool(spmd.get_logical_axis_rules()) and not jax.sharding.get_abstract_mesh().empty
    return {"out_sharding": names, "eager_sharding": ready and nnx.using_eager_sharding()}
