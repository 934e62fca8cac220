"""The calls in a program for which XLA calls back into Python when it partitions the program.

`jax.experimental.custom_partitioning` makes these calls; this module adds two things.

**The mesh.** jax takes the axes of the mesh from the arrays that a program is given. It refuses a
program with arrays of two meshes, even if only the types of the axes differ. Yet a function behind
`jax.sharding.auto_axes` has arrays of both. So where the mesh is known when a call is traced,
`on_mesh` keeps it with the call.

**Names that are the same in every process.** The callback is Python, and the program holds only a
name for it. jax uses the address of an object. The keys of jax's persistent cache of compiled
programs are derived from programs, so with addresses in them every key would change at a restart.
`name_call` makes a name from everything that the callback depends on:

* the files of this package as they were imported, and the versions of Python, jax and jaxlib;
* the function: where it is written, its bytecode, and whatever it closes over;
* how its arrays may be split, over which mesh, and for which platforms it is lowered;
* the part of jax's configuration that tracing depends on (`Tracing`, in which the callback traces).

Shapes, dtypes, shardings and the device are part of the program, and so of the key. Hence two
programs with one key compile to the same code. If something cannot be described in full, jax's own
name stays: such a program is compiled again after a restart, and never mistaken for another one.
"""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import platform
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import config as jax_config
from jax._src.custom_partitioning import _sharding_callbacks
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, use_abstract_mesh
from jaxlib.mlir import ir

_PACKAGE = Path(__file__).parents[1]
#: The state that tracing depends on and that says on which devices an operation is.
_PLACES = (
    "mesh_context_manager",
    "abstract_mesh_context_manager",
    "axis_env_state",
    "jax_default_device",
)


@dataclasses.dataclass(frozen=True)
class Tracing:
    """The state of jax that a function was traced in.

    Attributes:
      options: names and values of the options that tracing depends on.
      others: names and values of other state that it depends on (metadata of operations, say).
    """

    options: tuple[tuple[str, Any], ...]
    others: tuple[tuple[str, Any], ...]

    @staticmethod
    def now() -> "Tracing":
        names = jax_config.trace_context_names()
        values = dict(zip(names, jax_config.trace_context(), strict=True))
        # a callback traces on no device and no mesh, with no axis names but those of the mesh
        for name in _PLACES:
            values.pop(name)
        known = jax_config.config_states
        options = tuple((name, value) for name, value in values.items() if name in known)
        # Unset state is left out: modules of jax add to it when they are imported.
        others = tuple(x for x in values.items() if x[0] not in known and x[1] not in (None, False))
        return Tracing(options, others)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Restores the options without the mesh: a callback traces the program of one device."""
        device = jax.sharding.get_abstract_mesh().abstract_device
        current = dict(Tracing.now().options)
        with contextlib.ExitStack() as stack:
            for name, value in self.options:
                if current[name] != value:
                    stack.enter_context(jax_config.config_states[name](value))
            stack.enter_context(use_abstract_mesh(AbstractMesh((), (), (), abstract_device=device)))
            yield


@dataclasses.dataclass(frozen=True, eq=False)
class _Inner:
    """The computation of a call, hidden from jax's search for operations that need the mesh."""

    jaxpr: Any


_on_mesh_p = Primitive("on_mesh")
_on_mesh_p.multiple_results = True
_on_mesh_p.def_abstract_eval(lambda *arrays, inner, mesh: inner.jaxpr.out_avals)
_on_mesh_p.def_impl(lambda *arrays, inner, mesh: jaxpr_as_fun(inner.jaxpr)(*arrays))


def on_mesh(function: Callable, mesh: AbstractMesh, *arrays) -> list[jax.Array]:
    """`function(*arrays)`, in which a partitioned call is divided over the axes of `mesh`."""
    return _on_mesh_p.bind(*arrays, inner=_Inner(jax.make_jaxpr(function)(*arrays)), mesh=mesh)


def _lower_on_mesh(ctx, *values, inner, mesh):
    axes = ctx.module_context.axis_context
    count = getattr(axes, "num_devices", 0)  # inside shard_map there are none to divide over
    if count and axes.device_assignment is None:
        # Any devices will do: only their places in the mesh matter.
        backend = ctx.module_context.backend
        devices = tuple(backend.devices()[:count])
        if len(devices) < count:
            raise ValueError(
                f"a program for {count} devices must be lowered where there are as many, got "
                f"{len(devices)} of platform {backend.platform!r}"
            )
        mesh = mesh if mesh.size == count else axes.abstract_mesh
        axes = dataclasses.replace(axes, device_assignment=devices, abstract_mesh=mesh)
        ctx = ctx.replace(module_context=ctx.module_context.replace(axis_context=axes))
    return mlir.lower_fun(jaxpr_as_fun(inner.jaxpr), multiple_results=True)(ctx, *values)


mlir.register_lowering(_on_mesh_p, _lower_on_mesh)


class _NotKnown(Exception):
    """There is a value that cannot be described."""


def name_call(partition: Callable, what: Any) -> None:
    """Renames the call that was last added to a program after what it computes.

    Args:
      partition: the callback of the call, by which it is recognised.
      what: everything that the result of the callback depends on.
    """
    call = _last_operation()
    name = ir.StringAttr(call.attributes["backend_config"]).value.encode()
    info = _sharding_callbacks.get(name)
    if info is None or info.partition is not partition:
        return
    try:
        files = _files()
        if files != _IMPORTED:
            return  # the running code no longer matches the files
        platforms = tuple(info.module_context.platforms)
        description = _describe((_digest(files), _VERSIONS, platforms, what))
    except _NotKnown:
        return
    digest = "fsa_jax " + hashlib.sha256(description.encode()).hexdigest()
    same = _sharding_callbacks.setdefault(digest.encode(), info)
    if same.module_context.backend is not info.module_context.backend:
        return  # it would be lowered for another backend
    # the callback must live for as long as this program may be compiled
    info.module_context.add_keepalive(same)
    call.attributes["backend_config"] = ir.StringAttr.get(digest)
    # jax can be told to leave names out of keys (jax_remove_custom_partitioning_ptr_from_cache_key)
    attributes = ir.DictAttr.get({"fsa_jax.name": ir.StringAttr.get(digest)})
    call.attributes["mhlo.frontend_attributes"] = attributes


def _last_operation() -> ir.Operation:
    operations = ir.InsertionPoint.current.block.operations
    return operations[len(operations) - 1].operation


def _files() -> tuple[tuple[str, int, int], ...]:
    """The files of the package, with their sizes and times of change."""
    found = (x for x in _PACKAGE.rglob("*") if x.suffix in (".py", ".json"))
    stats = ((str(x.relative_to(_PACKAGE)), x.stat()) for x in sorted(found))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@functools.cache
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    if not files:
        raise _NotKnown
    content = hashlib.sha256()
    for name, size, _ in files:
        content.update(f"{name} {size} ".encode() + (_PACKAGE / name).read_bytes())
    return content.hexdigest()


_IMPORTED = _files()
_VERSIONS = (platform.python_version(), jax.__version__, importlib.metadata.version("jaxlib"))


def _describe(value: Any) -> str:
    """A text for a value: the same in every process, and different for different values."""
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return f"{type(value).__name__} {value!r}"
        case enum.Enum():
            return f"{_of(type(value))}.{value.name}"
        case np.dtype() | np.generic():
            return f"{type(value).__name__} {value!r}"
        case tuple() | list():
            return f"{_of(type(value))}[{', '.join(map(_describe, value))}]"
        case frozenset():
            return f"frozenset[{', '.join(sorted(map(_describe, value)))}]"
        case dict():
            return f"dict{_describe(list(value.items()))}"
        case type():
            return f"type {_of(value)}"
        case functools.partial():
            return f"partial{_describe((value.func, value.args, value.keywords))}"
        case types.CodeType():  # tells apart the lambdas of a line
            return f"code{_describe((value.co_code, value.co_names, value.co_consts))}"
        case types.FunctionType():
            return _describe_function(value)
        case jax.sharding.Mesh() | jax.sharding.AbstractMesh():
            return f"mesh{_describe(tuple(value.shape.items()))}"
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        # a field may hold only the name of something; its metadata says how to get at that
        read = ((x, x.metadata.get("describe", lambda value: value)) for x in fields)
        values = {x.name: get(getattr(value, x.name)) for x, get in read}
        return f"{_of(type(value))}{_describe(values)}"
    raise _NotKnown


def _describe_function(function: types.FunctionType) -> str:
    # where it is written: `functools.wraps` changes its `__module__`
    module = str(function.__globals__.get("__name__"))
    if module.partition(".")[0] != __name__.partition(".")[0]:
        raise _NotKnown  # its source is not in the digest
    code = function.__code__
    try:
        closure = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError as error:  # not bound yet
        raise _NotKnown from error
    where = (module, function.__qualname__, code.co_firstlineno)
    return _describe((*where, code, closure, function.__defaults__, function.__kwdefaults__))


def _of(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"
