"""How the operations divide over the devices of a mesh.

The sequences of a batch and the KV heads are independent, so a function whose arrays are split over
them is the same function on each device's part, with no communication between devices. XLA does not
see that of a kernel, and not always of a loop. So each computation is a `partitioned` function:

* Axes of type Auto: XLA's partitioner asks `jax.experimental.custom_partitioning` for the program
  of one device when it has decided how the arrays are split.
* Axes of type Explicit: the shardings are part of the types. `partitions_itself` checks them, and
  hands the axes over to the partitioner for the duration of the call. Arrays that are on no mesh
  follow those that are, and are placed on the mesh that is set, if one is.
* Inside `shard_map` or `pmap` the arrays are one device's part already.

Shapes: b sequences of the batch, n query heads, k key/value heads; other letters are never split.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from fsa_jax.ops.partition_calls import Tracing, name_call, on_mesh


def partitioned(
    function: Callable,
    operands: dict[str, str],
    results: tuple[str, ...],
    sequence: tuple[Callable, str, int] | None = None,
) -> Callable[..., Any]:
    """`function`, computed on each device for its sequences and heads.

    It has no derivative. Call it inside jit; in eager mode XLA would gather the arrays first.

    Args:
      function: maps arrays to a tuple of arrays. It is also called with the parts of one device, so
        anything that depends on shapes, such as the tiles of kernels, must be decided inside it.
      operands: name and axes of each argument, for example {"query": "b t n d"}.
      results: axes of each result.
      sequence: what a device computes of `function`, with collectives, when tokens t and windows m
        are split over a mesh axis; the axis; and how many tokens there are to a window.

    Returns:
      A function of the same arrays. `vmap` makes its axis part of the batch.
    """
    part, sequence_axis, stride = sequence or (function, None, 1)
    split = custom_partitioning(lambda tracing, *arrays: function(*arrays), static_argnums=(0,))

    def partition(tracing, mesh, arrays, outs):
        del outs
        shardings = {name: x.sharding for name, x in zip(operands, arrays, strict=True)}
        shapes = {name: x.shape for name, x in zip(operands, arrays, strict=True)}
        mesh, specs = _by_axes(shardings, shapes, mesh, sequence_axis)
        place = places(operands, specs, shapes, dict(mesh.shape), sequence_axis)

        def on_one_device(*arrays):
            with tracing.again():
                return tuple(part(*arrays))

        shardings = tuple(NamedSharding(mesh, place(axes)) for axes in operands.values())
        return (
            mesh,
            on_one_device,
            tuple(NamedSharding(mesh, place(axes)) for axes in results),
            shardings,
        )

    rule = f"{', '.join(operands.values())} -> {', '.join(results)}"
    factors: dict[str, Any] = {}
    if stride > 1 and re.search(r"\bm\b", rule):
        # split together: tokens are windows times the stride
        rule, factors = re.sub(r"\bt\b", "(m stride)", rule), {"stride": stride}

    def sharding_rule(tracing, mesh, *types):
        del types
        name_call(partition, (function, operands, results, sequence, tracing, mesh))
        return rule, factors

    # XLA's shardings, some of which cannot be expressed by the axes of a mesh
    split.def_partition(partition, sharding_rule=sharding_rule, decode_shardings=False)

    @custom_vmap
    def call(*arrays):
        _refuse_partly_manual()
        run = functools.partial(split, Tracing.now())
        meshes = [jax.typeof(x).sharding.mesh for x in arrays] + [jax.sharding.get_abstract_mesh()]
        known = next((x for x in meshes if not x.empty and not x.manual_axes), None)
        return tuple(run(*arrays) if known is None else on_mesh(run, known, *arrays))

    @call.def_vmap
    def _(size, batched, *arrays):
        def merge(x, mapped):
            x = x if mapped else jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        outs = call(*map(merge, arrays, batched))
        outs = tuple(x.reshape(size, -1, *x.shape[1:]) for x in outs)
        return outs, (True,) * len(outs)

    return call


def _by_axes(shardings, shapes, mesh: Mesh, whole: str | None):
    """A mesh, and how each argument is split over its axes.

    Args:
      shardings: XLA's shardings of the arguments by name; None: not split.
      shapes: shapes of the arguments.
      mesh: the mesh of the arrays that are on one; empty if none is.
      whole: a mesh axis that must not be cut into factors.

    Raises:
      ValueError: there is no such mesh.
    """
    specs = {name: PartitionSpec() for name in shardings}
    tiles, devices = {}, []
    for name, sharding in shardings.items():
        if sharding is not None:
            tiles[name], devices = _tiles(sharding, len(shapes[name]))
    if not devices:
        return mesh, specs
    sizes = dict(mesh.shape) or {"devices": len(devices)}
    # Two axes of an array that was reshaped may share a mesh axis, each split over a factor of it.
    for axes in (sizes, *(_factored(sizes, whole, order) for order in (1, -1))):
        specs |= {name: _spec(tile, axes) for name, tile in tiles.items()}
        if None not in specs.values():
            return Mesh(np.reshape(devices, tuple(axes.values())), tuple(axes)), specs
    raise ValueError(
        f"arrays must be split over axes of the mesh {sizes} or parts of them, got {shardings}"
    )


def _tiles(sharding: Sharding, rank: int) -> tuple[np.ndarray, list]:
    """Where each device's part begins along each axis, for axes as long as there are devices."""
    count = sharding.num_devices
    places = sharding.devices_indices_map((count,) * rank)
    starts = [[part.start or 0 for part in place] for place in places.values()]
    return np.reshape(starts, (count, rank)), list(places)


def _factored(sizes: dict[str, int], whole: str | None, order: int) -> dict[str, int]:
    """The sizes of a mesh whose axes are the prime factors of the axes of another one."""
    axes = {}
    for name, size in sizes.items():
        factors, rest = [], size
        for prime in range(2, size + 1):
            while rest % prime == 0:
                factors.append(prime)
                rest //= prime
        if name == whole or len(factors) < 2:
            axes[name] = size
        else:
            axes |= {f"{name}[{i}]": factor for i, factor in enumerate(factors[::order])}
    return axes


def _spec(tiles: np.ndarray, sizes: dict[str, int]) -> PartitionSpec | None:
    """The axes of a mesh that split an array in this way; None where no axes do."""
    coordinates = dict(zip(sizes, np.indices(tuple(sizes.values())), strict=True))
    entries = []
    for tile in np.moveaxis(tiles.reshape(*sizes.values(), -1), -1, 0):
        steps = {
            name: tile[tuple(int(other == name) for other in sizes)]
            for name, size in sizes.items()
            if size > 1
        }
        names = tuple(sorted(filter(steps.get, steps), key=steps.__getitem__, reverse=True))
        number, parts = np.zeros(tile.shape, int), 1
        for name in names:
            number, parts = number * sizes[name] + coordinates[name], parts * sizes[name]
        if not np.array_equal(tile, number * (tile.size // parts)):
            return None
        entries.append(names)
    return PartitionSpec(*entries)


def places(operands, specs, shapes, sizes, sequence_axis=None):
    """Checks how arguments are split; gives a function from an array's axes to its PartitionSpec.

    Raises:
      ValueError: an axis is split that cannot be.
    """
    if sequence_axis is not None and sequence_axis not in sizes:
        raise ValueError(
            f"sequence_axis must be an axis of the mesh {tuple(sizes)}, got {sequence_axis!r}"
        )
    found: dict[str, tuple[str, ...]] = {}
    lengths = {"b": 0}
    for name, axes in operands.items():
        entries = tuple(specs[name]) + (None,) * (len(shapes[name]) - len(specs[name]))
        for axis, length, entry in zip(axes.split(), shapes[name], entries, strict=True):
            lengths[axis] = length
            mesh_axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
            mesh_axes = tuple(x for x in mesh_axes if sizes[x] > 1)
            if not mesh_axes:
                continue
            if axis in ("t", "m") and mesh_axes == (sequence_axis,):
                continue
            if axis not in ("b", "n", "k"):
                raise ValueError(_refusal(name, axis, axes, mesh_axes))
            found.setdefault(axis, mesh_axes)
    heads = found.get("n") or found.get("k", ())
    kv_heads, parts = lengths.get("k"), math.prod(sizes[x] for x in heads)
    if kv_heads is not None and kv_heads % parts:
        raise ValueError(
            f"the {kv_heads} KV heads must be a multiple of the {parts} devices of mesh axis "
            f"{_words(heads)}, so that the query heads of a group stay on one device: split the "
            f"heads over at most {kv_heads} devices, and the batch over the others"
        )
    rows = found.get("b", ())
    if lengths["b"] % math.prod(sizes[x] for x in rows):
        raise ValueError(
            f"the batch size {lengths['b']} must be a multiple of the devices of mesh axis "
            f"{_words(rows)}"
        )
    split = {"b": rows or None, "n": heads or None, "k": heads or None}
    split |= {"t": sequence_axis, "m": sequence_axis}

    def place(axes: str) -> PartitionSpec:
        return PartitionSpec(*(split.get(axis) for axis in axes.split()))

    return place


def _refusal(name: str, axis: str, axes: str, mesh_axes: tuple[str, ...]) -> str:
    words = {"t": "tokens", "d": "head width", "e": "head width", "m": "windows"}
    cure = "split rows (the batch) and KV heads instead"
    if axis in "tm":
        cure += ", or give sequence_axis"
    return (
        f"the axis of {words.get(axis, axis)} of {name} [{axes.upper()}] must not be split, got "
        f"mesh axis {_words(mesh_axes)}: {cure}"
    )


def _words(mesh_axes: tuple[str, ...]) -> str:
    return " and ".join(map(repr, mesh_axes))


def _refuse_partly_manual() -> None:
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return
    sizes = dict(mesh.shape)
    others = tuple(x for x in mesh.axis_names if x not in mesh.manual_axes and sizes[x] > 1)
    if others:
        raise ValueError(
            "a shard_map around a function of fsa_jax must be over all axes of the mesh, got "
            f"{_words(others)} left out: name all of them in axis_names"
        )


def partitions_itself[**P, R](**operands: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a public function: serves arrays that are split over Explicit axes of a mesh.

    Args:
      **operands: the array arguments and their axes except the batch. The first result is split as
        the first argument is, and a second one, if asked for, likewise without the last axis.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        first = next(iter(operands))

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            mesh = explicit_mesh((args, kwargs))
            if mesh is None:
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            specs, shapes, axes = {}, {}, {}
            for name, x in given.items():
                if name not in operands or not isinstance(x, jax.Array | np.ndarray):
                    continue
                extra = x.ndim - len(operands[name].split())
                if extra in (0, 1):
                    axes[name] = "b " * extra + operands[name]
                    shapes[name], specs[name] = x.shape, explicit_spec(x)
            if first not in axes:  # not what it takes, which it says itself
                return function(*args, **kwargs)
            axis = given.get("sequence_axis")
            place = places(axes, specs, shapes, dict(mesh.shape), axis)(axes[first])
            out = (place, PartitionSpec(*place[:-1])) if given.get("return_residuals") else place
            call: Any = function
            return on_auto_axes(lambda given: call(**given), mesh, out, given)

        return wrapper

    return decorate


def on_auto_axes(function: Callable, mesh: AbstractMesh, out_specs: Any, given: Any) -> Any:
    """`function(given)` with the Explicit axes of a mesh handed over to the partitioner.

    Args:
      function: takes a tree.
      mesh: the mesh that the types of the arrays name.
      out_specs: PartitionSpec of each result.
      given: the tree. An array that `function` closed over instead would keep its type, and its
        gradient would have another one.
    """
    leaves, tree = jax.tree.flatten(given)
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
    if not jax.sharding.get_abstract_mesh().empty:
        # Straight from no mesh to Auto axes, the gradient would be on Auto axes outside of here.
        whole = NamedSharding(mesh, PartitionSpec())
        for i in places:
            if jax.typeof(leaves[i]).sharding.mesh.empty:
                leaves[i] = jax.sharding.reshard(leaves[i], whole)

    def call(arrays):
        found = dict(zip(places, arrays, strict=True))
        return function(tree.unflatten(found.get(i, x) for i, x in enumerate(leaves)))

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs)
    run = jax.sharding.auto_axes(call, axes=mesh.explicit_axes, out_sharding=shardings)
    return run([leaves[i] for i in places])


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh with Explicit axes that the types of arrays name, or else that is set, if one is."""
    arrays = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    found = {mesh for mesh in meshes if mesh.explicit_axes}
    if len(found) > 1:
        raise ValueError(f"arrays must be on one mesh, got some on each of {found}")
    mesh = found.pop() if found else jax.sharding.get_abstract_mesh()
    return mesh if mesh.explicit_axes else None


def explicit_spec(x: jax.Array | np.ndarray) -> PartitionSpec:
    """How an array is split according to its type; it is unsplit if the type does not say."""
    return jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else PartitionSpec()
