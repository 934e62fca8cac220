"""Data, tensor and sequence parallelism on eight CPU devices against one, and refused cases."""

import contextlib
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from util import assert_close, normal

import fsa_jax
from fsa_jax import from_zigzag, to_zigzag
from fsa_jax.layers import NativeSparseAttention
from fsa_jax.ops import partition
from fsa_jax.transformer import Transformer, TransformerConfig
from ops.sharded import (
    CONFIG,
    GATES,
    HEADS,
    IDS,
    KEY,
    KV_HEADS,
    QUERY,
    ROWS,
    TOKENS,
    VALUE,
    WEIGHTS,
    WIDTH,
    mesh_of,
    operator,
)

COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


@functools.cache
def alone(packed=True):
    run = jax.jit(operator("xla", packed=packed))
    return run(QUERY, KEY, VALUE, GATES, WEIGHTS, IDS)


def compiled(run, mesh, spec, arrays):
    """Returns the results on a mesh, and how many collectives of each kind the program has."""
    heads = NamedSharding(mesh, spec)
    rows = NamedSharding(mesh, P(*spec[:2]))
    weights = NamedSharding(mesh, P(spec[2] if len(spec) > 2 else None))
    placed = (*jax.device_put(arrays[:4], heads), *map(jax.device_put, arrays[4:], (weights, rows)))
    explicit = mesh.axis_types[0] == AxisType.Explicit
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        program = jax.jit(run).lower(*placed).compile()
        found = re.findall(COLLECTIVES, str(program.as_text()))
        return program(*placed), {name: found.count(name) for name in set(found)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "kind"),
    [("xla", "auto"), ("xla", "explicit"), ("triton_interpret", "auto")],
)
def test_rows_and_heads_are_split_without_a_word_between_devices(implementation, kind):
    """The only communication sums the gradient of phi's weights over the batch."""
    mesh = mesh_of(kind, ("data", 4), ("tensor", 2))
    arrays = (QUERY, KEY, VALUE, GATES, WEIGHTS, IDS)
    got, found = compiled(operator(implementation), mesh, P("data", None, "tensor"), arrays)
    assert set(found) == {"all-reduce"}
    assert_close(got, alone(), 1e-5)
    for x in jax.tree.leaves(got)[:4]:
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "tensor")), x.ndim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "kind", "packed"),
    [("xla", "auto", False), ("xla", "explicit", True), ("triton_interpret", "auto", True)],
)
def test_a_row_over_several_devices(implementation, kind, packed):
    mesh = mesh_of(kind, ("sequence", 4), ("tensor", 2))
    ordered = functools.partial(to_zigzag, devices=4)
    arrays = (*map(ordered, (QUERY, KEY, VALUE, GATES)), WEIGHTS, ordered(IDS))
    run = operator(implementation, "sequence", packed)
    got, found = compiled(run, mesh, P(None, "sequence", "tensor"), arrays)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    out, (*tokens, weights) = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), got)
    got = (from_zigzag(out, 4), (*(from_zigzag(x, 4) for x in tokens), weights))
    assert_close(got, alone(packed), 1e-5)


@pytest.mark.slow
def test_inside_shard_map_the_axis_is_used_as_it_is():
    mesh = mesh_of("auto", ("sequence", 4))
    tokens = P(None, "sequence")

    def part(*arrays):
        out, (*gradients, weights) = operator("xla", "sequence")(*arrays)
        return out, (*gradients, jax.lax.psum(weights, "sequence"))

    specs = (*(tokens,) * 4, P(), tokens)
    run = jax.shard_map(
        part, mesh=mesh, in_specs=specs, out_specs=(tokens, specs[:5]), check_vma=False
    )
    ordered = functools.partial(to_zigzag, devices=4)
    arrays = (*map(ordered, (QUERY, KEY, VALUE, GATES)), WEIGHTS, ordered(IDS))
    out, (*gradients, weights) = jax.jit(run)(*arrays)
    back = functools.partial(from_zigzag, devices=4)
    assert_close((back(out), (*map(back, gradients), weights)), alone(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "axis"), [("explicit", None), ("auto", "data")])
def test_the_layer(kind, axis):
    """The axis splits the batch or the tokens of a sequence; each branch has its own keys."""

    def make(axis):
        return NativeSparseAttention(
            HEADS, 16, num_kv_heads=KV_HEADS, head_dim=WIDTH, config=CONFIG, kv_per_branch=True,
            implementation="xla", sequence_axis=axis, rngs=nnx.Rngs(0),
        )  # fmt: skip

    def program(axis):
        graphdef, state = nnx.split(make(axis))

        def run(state, x, ids):
            def call(state, x):
                return nnx.merge(graphdef, state)(x, ids)

            out, pull = jax.vjp(jax.checkpoint(call), state, x)
            return out, pull(jnp.cos(out))

        return run, state

    x = normal(7, ROWS, TOKENS, 16)
    run, state = program(None)
    wanted = jax.jit(run)(state, x, IDS)
    mesh = mesh_of(kind, ("data", 2), ("tensor", 2))
    run, state = program(axis)
    order = [functools.partial(f, devices=2) for f in (to_zigzag, from_zigzag)]
    there, back = order if axis else (lambda x: x,) * 2
    spec = P(None, "data") if axis else P("data")
    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        rows = jax.device_put((there(x), there(IDS)), NamedSharding(mesh, spec))
        placed = jax.device_put(state, NamedSharding(mesh, P()))
        out, (dstate, dx) = jax.jit(run)(placed, *rows)
    out, dx, dstate = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (out, dx, dstate))
    assert_close((back(out), (dstate, back(dx))), wanted, 1e-5)


def split_window(spec, mesh, sequence=None):
    """Runs the window branch with a query that is split by `spec`; each group has two heads."""
    query = jax.device_put(normal(0, 2, 16, 8, 8), NamedSharding(mesh, spec))
    keys = jnp.ones((2, 16, 4, 8))
    explicit = mesh.axis_types[0] == AxisType.Explicit
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        run = functools.partial(
            fsa_jax.sliding_window_attention, window_size=4, implementation="xla"
        )
        return jax.jit(run)(query, keys, keys)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P(None, None, None, "model"), "head width of query .* mesh axis 'model': split rows"),
        (
            P(None, None, "model"),
            "4 KV heads must be a multiple of the 8 devices of mesh axis 'model'",
        ),
        (P(None, "model"), "tokens of query .* mesh axis 'model': .*sequence_axis"),
    ],
)
def test_what_cannot_be_split_names_the_axis_and_the_cure(kind, spec, message):
    mesh = mesh_of(kind, ("model", 8))
    with pytest.raises(
        ValueError if kind == "explicit" else jax.errors.JaxRuntimeError, match=message
    ):
        split_window(spec, mesh)


def test_a_shard_map_over_some_axes_is_refused():
    mesh = mesh_of("auto", ("data", 2), ("model", 2))
    run = functools.partial(fsa_jax.sliding_window_attention, window_size=4, implementation="xla")
    some = jax.shard_map(
        lambda query, key: run(query, key, key),
        mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="'model' left out: name all of them"):
        jax.jit(some)(normal(0, 2, 16, 4, 8), normal(1, 2, 16, 2, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_axis": 3}, "sequence_axis must be None or the name of a mesh axis, got 3"),
        ({"tokens": 60}, "tokens must be a multiple of 2 \\* devices \\* kernel_stride .* got 60"),
        ({"implementation": "reference"}, "'reference' cannot serve sequence_axis='sequence'"),
    ],
)
def test_bad_calls_over_a_sequence_axis(changes, message):
    options = {"tokens": 64, "sequence_axis": "sequence", "implementation": "xla"} | changes
    tokens = options.pop("tokens")
    query, key = jnp.ones((1, tokens, 4, 8)), jnp.ones((1, tokens, 2, 8))
    compressed, gates = jnp.ones((1, tokens // 4, 2, 8)), jnp.ones((1, tokens, 4, 3))
    with pytest.raises((ValueError, NotImplementedError), match=message):
        fsa_jax.native_sparse_attention(
            query, key, key, compressed, compressed, gates, config=CONFIG, **options
        )


def test_chunks_are_an_early_and_a_late_one():
    x = jnp.arange(12)
    ordered = to_zigzag(x, 3, axis=0)
    np.testing.assert_array_equal(ordered, [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7])
    np.testing.assert_array_equal(from_zigzag(ordered, 3, axis=0), x)
    with pytest.raises(ValueError, match=r"multiple of 2 \* devices = 10, got 12"):
        to_zigzag(x, 5, axis=0)


MIXED = {
    "auto": (AxisType.Auto, AxisType.Auto),
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "mixed": (AxisType.Explicit, AxisType.Auto),
}


def twice(query, key, value, gates, weights):
    """A scan over compression and attention, with gradients of all arguments."""

    def attend(query, key, value, gates, weights):
        attend = functools.partial(operator_alone, key, value, gates, weights)
        return jax.lax.scan(lambda x, _: (attend(x), None), query, None, length=2)[0]

    out, pull = jax.vjp(attend, query, key, value, gates, weights)
    return out, pull(jnp.cos(out))


def operator_alone(key, value, gates, weights, query):
    sizes = {"kernel_size": 8, "kernel_stride": 4, "weights": weights}
    compressed_key, compressed_value = (fsa_jax.compress(x, **sizes) for x in (key, value))
    return fsa_jax.native_sparse_attention(
        query, key, value, compressed_key, compressed_value, gates,
        config=CONFIG, implementation="xla",
    )  # fmt: skip


@functools.cache
def twice_alone():
    return jax.jit(twice)(QUERY, KEY, VALUE, GATES, WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kind", "on_mesh"),
    [
        ("jit", "auto", ()), ("jit", "explicit", ()), ("jit", "auto", (1, 2)),
        ("jit", "mixed", (0, 3)), ("eager", "explicit", (1, 2)),
    ],
)  # fmt: skip
def test_arrays_on_no_mesh_under_set_mesh(how, kind, on_mesh):
    """None or some of the arrays are on the mesh; the others are split along the batch."""
    arrays = [QUERY, KEY, VALUE, GATES, WEIGHTS]
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), MIXED[kind], devices=jax.devices()[:4])
    for i in on_mesh:
        arrays[i] = jax.device_put(arrays[i], NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        got = (jax.jit(twice) if how == "jit" else twice)(*arrays)
    assert_close(got, twice_alone(), 1e-5)


def attend_window(query, key):
    run = functools.partial(fsa_jax.sliding_window_attention, window_size=6, implementation="xla")
    return run(query, key, key)


@functools.cache
def window_alone():
    return jax.jit(attend_window)(QUERY, KEY)


@pytest.mark.parametrize(
    "kind", ["auto", "explicit", "mixed", "numpy", "in_shardings", "one device", "two meshes"]
)
def test_shardings_of_other_kinds(kind):
    types = MIXED.get(kind, MIXED["auto"])
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), types, devices=jax.devices()[:4])
    rows = NamedSharding(mesh, P("data"))
    run, query, key = attend_window, QUERY, KEY
    if kind == "in_shardings":  # the types of the arrays do not contain the mesh
        query, key = np.asarray(query), np.asarray(key)
        got = jax.jit(run, in_shardings=(rows, NamedSharding(mesh, P("data", None, "tensor"))))
    elif kind == "two meshes":  # both have the same devices
        line = jax.make_mesh((4,), ("all",), (AxisType.Auto,), devices=jax.devices()[:4])
        query, key = jax.device_put(query, rows), jax.device_put(key, NamedSharding(line, P("all")))
        got = jax.jit(run)
    elif kind == "one device":
        query = jax.device_put(query, jax.sharding.SingleDeviceSharding(jax.devices()[1]))
        key, got = jax.device_put(key, query.sharding), jax.jit(run)
    elif kind == "numpy":
        query, key, got = np.asarray(query), np.asarray(key), jax.jit(run)
    else:
        query, got = jax.device_put(query, rows), jax.jit(run)
    with jax.set_mesh(mesh) if kind in (*MIXED, "numpy") else contextlib.nullcontext():
        assert_close(got(query, key), window_alone(), 1e-6)


def test_rows_split_over_a_part_of_a_mesh_axis():
    """A reshape leaves such a sharding behind, which no PartitionSpec can express."""
    rows = NamedSharding(mesh_of("auto", ("data", 8)), P("data"))
    query, key = (jnp.concatenate([x, x + 1]) for x in (QUERY, KEY))

    def turned(x, rows, columns):
        x = x.reshape(rows, columns, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(8, *x.shape[2:])

    def run(query, key):  # order of sequences: 0 4 1 5 2 6 3 7
        return turned(attend_window(*(turned(x, 2, 4) for x in (query, key))), 4, 2)

    placed = jax.device_put((query, key), rows)
    program = jax.jit(run).lower(*placed).compile()
    assert not re.findall(COLLECTIVES, str(program.as_text()))
    assert_close(program(*placed), jax.jit(run)(query, key), 1e-6)


@pytest.mark.parametrize(
    ("tiles", "spec"),
    [
        ([0, 0, 2, 2, 4, 4, 6, 6], P(("a",))),
        ([0, 4, 0, 4, 0, 4, 0, 4], P(("b",))),
        ([0, 4, 1, 5, 2, 6, 3, 7], P(("b", "a"))),
        ([0, 0, 0, 0, 4, 4, 4, 4], None),
    ],
)
def test_how_an_array_is_split_is_read_from_where_devices_begin(tiles, spec):
    assert partition._spec(np.asarray(tiles)[:, None], {"a": 4, "b": 2, "one": 1}) == spec


def test_axes_are_cut_into_prime_factors():
    parts = partition._factored({"a": 4, "b": 2, "one": 1}, None, 1)
    assert parts == {"a[0]": 2, "a[1]": 2, "b": 2, "one": 1}
    assert partition._spec(np.repeat([0, 4], 4)[:, None], parts) == P(("a[0]",))
    assert partition._factored({"a": 4, "b": 6}, "a", -1) == {"a": 4, "b[0]": 3, "b[1]": 2}


@pytest.mark.slow
def test_a_model_with_tokens_over_explicit_axes():
    config = TransformerConfig(
        vocab_size=32, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_dim=16, nsa=CONFIG, implementation="xla",
    )  # fmt: skip
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(ROWS * 32, dtype=jnp.int32).reshape(ROWS, 32) % 32
    mesh = mesh_of("explicit", ("data", 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(tokens, NamedSharding(mesh, P("data")))
        got = jax.jit(model)(placed, IDS[:, :32])
        assert jax.typeof(got).sharding.spec == P("data", None, None)
    assert_close(got, jax.jit(model)(tokens, IDS[:, :32]), 1e-5)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"tokens of tokens .* mesh axis 'data'"),
    ):
        model(jax.device_put(tokens, NamedSharding(mesh, P(None, "data"))))


def test_gradients_are_on_the_mesh_that_is_set():
    """Outside jit, gradients of arrays on no mesh are on the mesh with its Explicit axes.

    On Auto axes of that mesh, they could not be combined with any other array.
    """
    mesh = mesh_of("explicit", ("data", 2))
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda query: jnp.sum(attend_window(query, KEY) ** 2))(QUERY)
        assert gradient.sharding.mesh == mesh
        assert (QUERY - gradient).shape == QUERY.shape


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_a_mesh_of_one_device(kind):
    with jax.set_mesh(mesh_of(kind, ("data", 1))):
        assert_close(jax.jit(attend_window)(QUERY, KEY), window_alone(), 1e-6)


def test_lowering_for_more_devices_than_there_are_is_refused():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (QUERY, KEY)]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((16,), ("data",))):
        traced = jax.jit(attend_window).trace(*shapes)
        with pytest.raises(ValueError, match=r"for 16 devices must be lowered where .* got 8"):
            traced.lower(lowering_platforms=("cpu",))


def test_arrays_on_two_explicit_meshes_are_refused():
    rows = (NamedSharding(mesh_of("explicit", (name, 2)), P(name)) for name in ("data", "tensor"))
    arrays = map(jax.device_put, (QUERY, KEY), rows)
    with pytest.raises(ValueError, match="arrays must be on one mesh"):
        attend_window(*arrays)


def test_explicit_calls_are_bound_as_any_other():
    attend: Any = fsa_jax.sliding_window_attention  # a type checker rejects these calls
    with jax.set_mesh(mesh_of("explicit", ("data", 2))):
        with pytest.raises(TypeError, match="too many positional arguments"):
            attend(QUERY, KEY, VALUE, 6, window_size=6)
        with pytest.raises(ValueError, match=r"key must have shape \[B T K D\]"):
            attend(QUERY, KEY[0], VALUE, window_size=6)
        with pytest.raises(ValueError, match="query must be an array"):
            attend(None, KEY, VALUE, window_size=6)
