"""Data, tensor and sequence parallel on eight CPU devices, against one; and what is refused."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from util import assert_close, normal

import fsa_jax
from fsa_jax import NSAConfig, from_stripes, to_stripes
from fsa_jax.layers import NativeSparseAttention

CONFIG = NSAConfig(
    kernel_size=8, kernel_stride=4, block_size=16, topk=3, init_blocks=1, local_blocks=1,
    window_size=6,
)  # fmt: skip
ROWS, TOKENS, HEADS, KV_HEADS, WIDTH = 4, 64, 4, 2, 8
LENGTHS = ([20, 5, 30, 9], [3, 1, 56, 4], [64, 0, 0, 0], [7, 25, 16, 16])
IDS = jnp.asarray(np.stack([np.repeat([1, 2, 3, 0], x) for x in LENGTHS]), jnp.int32)
QUERY, GATES = normal(0, ROWS, TOKENS, HEADS, WIDTH), normal(3, ROWS, TOKENS, HEADS, 3)
KEY, VALUE = (normal(i, ROWS, TOKENS, KV_HEADS, WIDTH) for i in (1, 2))
WEIGHTS = normal(4, KV_HEADS, 8 * WIDTH, WIDTH) / 8
COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def operator(implementation, axis=None, packed=True):
    """Compression and attention with all gradients, as a function of arrays and ids."""

    def attend(ids, query, key, value, gates, weights):
        sizes = {"kernel_size": 8, "kernel_stride": 4, "weights": weights}
        ids = ids if packed else None
        sizes |= {"segment_ids": ids, "sequence_axis": axis}
        compressed_key, compressed_value = (fsa_jax.compress(x, **sizes) for x in (key, value))
        return fsa_jax.native_sparse_attention(
            query, key, value, compressed_key, compressed_value, gates,
            config=CONFIG, segment_ids=ids, implementation=implementation, sequence_axis=axis,
        )  # fmt: skip

    def run(query, key, value, gates, weights, ids):
        arrays = (query, key, value, gates, weights)
        out, pull = jax.vjp(functools.partial(attend, ids), *arrays)
        return out, pull(jnp.cos(out))

    return run


@functools.cache
def alone(packed=True):
    run = jax.jit(operator("xla", packed=packed))
    return run(QUERY, KEY, VALUE, GATES, WEIGHTS, IDS)


def mesh_of(kind, *axes):
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * len(axes)
    names, sizes = zip(*axes, strict=True)
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, axis_types=types, devices=devices)


def compiled(run, mesh, spec, arrays):
    """Results on a mesh, and the collectives of the program: how many of each kind."""
    heads = NamedSharding(mesh, spec)
    rows = NamedSharding(mesh, P(*spec[:2]))
    weights = NamedSharding(mesh, P(spec[2] if len(spec) > 2 else None))
    placed = (*jax.device_put(arrays[:4], heads), *map(jax.device_put, arrays[4:], (weights, rows)))
    explicit = mesh.axis_types[0] == AxisType.Explicit
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        program = jax.jit(run).lower(*placed).compile()
        found = re.findall(COLLECTIVES, str(program.as_text()))
        return program(*placed), {name: found.count(name) for name in set(found)}


@pytest.mark.parametrize(
    ("implementation", "kind"),
    [("xla", "auto"), ("xla", "explicit"), ("triton_interpret", "auto")],
)
def test_rows_and_heads_are_split_without_a_word_between_devices(implementation, kind):
    """Only the gradient of phi's weights is summed over the rows."""
    mesh = mesh_of(kind, ("data", 4), ("tensor", 2))
    arrays = (QUERY, KEY, VALUE, GATES, WEIGHTS, IDS)
    got, found = compiled(operator(implementation), mesh, P("data", None, "tensor"), arrays)
    assert set(found) == {"all-reduce"}
    assert_close(got, alone(), 1e-5)
    for x in jax.tree.leaves(got)[:4]:
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "tensor")), x.ndim)


@pytest.mark.parametrize(
    ("implementation", "kind", "packed"),
    [("xla", "auto", False), ("xla", "explicit", True), ("triton_interpret", "auto", True)],
)
def test_a_row_over_several_devices(implementation, kind, packed):
    mesh = mesh_of(kind, ("sequence", 4), ("tensor", 2))
    striped = functools.partial(to_stripes, devices=4)
    arrays = (*map(striped, (QUERY, KEY, VALUE, GATES)), WEIGHTS, striped(IDS))
    run = operator(implementation, "sequence", packed)
    got, found = compiled(run, mesh, P(None, "sequence", "tensor"), arrays)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    out, (*tokens, weights) = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), got)
    got = (from_stripes(out, 4), (*(from_stripes(x, 4) for x in tokens), weights))
    assert_close(got, alone(packed), 1e-5)


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
    striped = functools.partial(to_stripes, devices=4)
    arrays = (*map(striped, (QUERY, KEY, VALUE, GATES)), WEIGHTS, striped(IDS))
    out, (*gradients, weights) = jax.jit(run)(*arrays)
    back = functools.partial(from_stripes, devices=4)
    assert_close((back(out), (*map(back, gradients), weights)), alone(), 1e-5)


@pytest.mark.parametrize(("kind", "axis"), [("explicit", None), ("auto", "data")])
def test_the_layer(kind, axis):
    """Rows over the axis, or the tokens of a row; each branch with keys of its own."""

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
    order = [functools.partial(f, devices=2) for f in (to_stripes, from_stripes)]
    there, back = order if axis else (lambda x: x,) * 2
    spec = P(None, "data") if axis else P("data")
    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        rows = jax.device_put((there(x), there(IDS)), NamedSharding(mesh, spec))
        placed = jax.device_put(state, NamedSharding(mesh, P()))
        out, (dstate, dx) = jax.jit(run)(placed, *rows)
    out, dx, dstate = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (out, dx, dstate))
    assert_close((back(out), (dstate, back(dx))), wanted, 1e-5)


def split_window(spec, mesh, sequence=None):
    """The window branch with a query that is split so; the heads of a group are two."""
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


def test_stripes_are_an_early_and_a_late_one():
    x = jnp.arange(12)
    striped = to_stripes(x, 3, axis=0)
    np.testing.assert_array_equal(striped, [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7])
    np.testing.assert_array_equal(from_stripes(striped, 3, axis=0), x)
    with pytest.raises(ValueError, match=r"multiple of 2 \* devices = 10, got 12"):
        to_stripes(x, 5, axis=0)
