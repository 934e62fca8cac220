"""Logical names of parameter axes, and rules that map them to mesh axes."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from flax.core import spmd
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fsa_jax.arguments import scalars

LOGICAL_AXES = ("layers", "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "window")
"""Names that parameter axes may carry; an axis that is never worth splitting is named None.

``window`` is the axis of phi's matrices that holds all channels of all tokens of a window: for
``"linear"`` compression these have ``kernel_size * head_dim ** 2`` parameters per key/value head.
"""

type AxisNames = Mapping[str, str | None]
"""Other names for some of ``LOGICAL_AXES``, such as those of another framework."""


@contextlib.contextmanager
def sharding_rules(**mesh_axes: str | tuple[str, ...] | None) -> Iterator[None]:
    """Maps the logical axes of parameters to mesh axes for the duration of the context.

    Within the context ``nnx.get_partition_spec`` and ``nnx.get_named_sharding`` return mesh axes,
    and a module that is built under ``jax.set_mesh`` is sharded at construction. Logical axes that
    are left out are not split. The mesh axes must have type ``Auto``.

    Args:
      **mesh_axes: for a name in ``LOGICAL_AXES``, the mesh axis (or axes) that splits it.

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


def check_axis_names(axis_names: AxisNames | None) -> dict[str, str | None]:
    """Checks the argument `axis_names` of the layers; None: no axis has another name.

    Raises:
      ValueError: it is no dict, a key is not in ``LOGICAL_AXES``, or a name is neither a string nor
        None.
    """
    if axis_names is None:
        return {}
    if not isinstance(axis_names, Mapping):
        raise ValueError(f"axis_names must be a dict or None, got {scalars.short(axis_names)}")
    for name, other in axis_names.items():
        if name not in LOGICAL_AXES:
            raise ValueError(f"axis_names must have keys in {LOGICAL_AXES}, got {name!r}")
        if not isinstance(other, str | None):
            raise ValueError(
                f"axis_names[{name!r}] must be a string or None, got {scalars.short(other)}"
            )
    return dict(axis_names)


def partitioned(*names: str | None, axis_names: AxisNames | None = None) -> dict[str, Any]:
    """Metadata of a parameter whose axes carry these logical names.

    Args:
      *names: one of ``LOGICAL_AXES`` for each axis, or None.
      axis_names: other names that replace some of these.
    """
    other = check_axis_names(axis_names)
    replaced = tuple(None if name is None else other.get(name, name) for name in names)
    # By default Flax shards at construction and raises if no mesh is set. Layers of this package
    # can be built anywhere: they are sharded at construction only if both a mesh and rules are set.
    ready = bool(spmd.get_logical_axis_rules()) and not jax.sharding.get_abstract_mesh().empty
    return {"out_sharding": replaced, "eager_sharding": ready and nnx.using_eager_sharding()}


#: What the mesh axes of training split: "tensor" heads and hidden features, and "data" the rest of
#: the parameters, with fsdp.
_TENSOR = ("heads", "kv_heads", "mlp")
_DATA = ("embed", "window")


def training_shardings(state: Any, mesh: Mesh, *, fsdp: bool) -> Any:
    """The shardings of the parameters of a model by the rules of training, as a nested dict.

    Args:
      state: the state of the model, of arrays or of shapes, with the names of their axes.
      mesh: a mesh with the axes "data" and "tensor", or one of them.
      fsdp: whether parameters are split over "data" too.
    """
    rules = dict.fromkeys(_TENSOR, "tensor") | (dict.fromkeys(_DATA, "data") if fsdp else {})
    rules = {name: axis for name, axis in rules.items() if axis in mesh.axis_names}
    with sharding_rules(**rules):
        specs = nnx.to_pure_dict(nnx.get_partition_spec(state))

    def place(path, spec):
        # If an embedding table were split over its features, XLA would split all activations
        # so, and compute every sequence on every device. The other exceptions are vectors.
        whole = {str(key.key) for key in path} & {"embedding", "head", "scale", "bias"}
        return NamedSharding(mesh, PartitionSpec() if whole else spec)

    return jax.tree_util.tree_map_with_path(place, specs)


def current_shardings(state: Any, mesh: Mesh) -> Any | None:
    """Like `training_shardings`, by the rules of ``sharding_rules``; None outside of it."""
    if not spmd.get_logical_axis_rules():
        return None
    return nnx.to_pure_dict(nnx.get_named_sharding(state, mesh))
