"""Names of partitioned calls, and jax's persistent compilation cache, whose keys contain them."""

import contextlib
import functools
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fsa_jax
from fsa_jax.ops import partition_calls
from fsa_jax.ops.partition import partitioned
from fsa_jax.pallas import tile_tables
from fsa_jax.pallas.range_attention import passes as ranges
from fsa_jax.pallas.tile_config import Tile
from fsa_jax.training.compilation_cache import keep_compiled_programs
from ops.sharded import GATES, IDS, KEY, QUERY, VALUE, WEIGHTS, mesh_of, operator


def names(run, *arrays):
    """Returns the names of a program's partitioned calls, in order."""
    text = jax.jit(run).lower(*arrays).as_text()
    return re.findall(r'@CustomSPMDPartitioning\(.*?backend_config = "(.*?)"', text)


def split(mesh=None, dtype=jnp.float32):
    mesh = mesh or mesh_of("auto", ("data", 2), ("tensor", 2))
    rows = NamedSharding(mesh, P(mesh.axis_names[0]))
    return [jax.ShapeDtypeStruct(x.shape, dtype, sharding=rows) for x in (QUERY, KEY)]


def window(query, key, *, window_size=8, scale=0.5, implementation="xla"):
    options = {"window_size": window_size, "scale": scale, "implementation": implementation}
    return fsa_jax.sliding_window_attention(query, key, key, **options)


def whole_operator() -> list[str]:
    """Returns names of calls of all kinds: forward and backward, batch-split and sequence-split."""
    found = names(functools.partial(window, implementation="triton_interpret"), *split())
    for axis in (None, "tokens"):
        mesh = mesh_of("auto", ("data", 2), ("tokens", 2))
        tokens = NamedSharding(mesh, P("data", axis))
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=tokens) for x in ARRAYS[:4]]
        arrays += [ARRAYS[4], jax.ShapeDtypeStruct(IDS.shape, IDS.dtype, sharding=tokens)]
        found += names(operator("xla", axis), *arrays)
    return found


ARRAYS = (QUERY, KEY, VALUE, GATES, WEIGHTS, IDS)


@pytest.mark.slow
def test_names_are_the_same_in_another_process():
    found = whole_operator()
    # the window call, calls split by batch, calls split by sequence
    assert len(set(found)) == 1 + 8 + 6
    assert all(re.fullmatch("fsa_jax [0-9a-f]{64}", name) for name in found)
    code = (
        "import conftest, json, ops.test_partition_calls as x; "
        "print(json.dumps(x.whole_operator()))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    folder = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == found


def test_whatever_a_call_depends_on_changes_its_name(monkeypatch):
    def name(run=window, arrays=None, **options):
        (found,) = names(functools.partial(run, **options), *(arrays or split()))
        return found

    before = name()
    assert name(window_size=9) == before  # the window size is an operand, not part of the name
    others = [name(scale=0.25), name(implementation="triton_interpret")]
    others += [name(arrays=split(mesh_of("auto", *axes))) for axes in OTHER_MESHES]
    with jax.default_matmul_precision("float32"):
        others.append(name())
    with jax.enable_x64(True):
        others.append(name())
    for rows in (16, 32, 32):
        with tile_tables.using({RANGE: ranges.RangeTile(rows=rows)}):
            others.append(name(implementation="triton_interpret"))
    assert others.pop() == others[-1]  # equal tables give equal names
    assert len({before, *others}) == 1 + len(others)
    assert name() == before
    monkeypatch.setattr(partition_calls, "_VERSIONS", ("another",))
    assert name() != before


OTHER_MESHES = ((("data", 4), ("tensor", 2)), (("tensor", 2), ("data", 2)))
RANGE = tile_tables.Key(
    kernel="range_forward", branch="window", bits=32, width=16, value_width=16, group=2,
    block_size=None,
)  # fmt: skip


def test_what_cannot_be_described_keeps_the_name_that_jax_gives(monkeypatch):
    def double(x):  # defined outside the package
        return (2 * x,)

    def of(run):
        (name,) = names(run, *split()[:1])
        return name

    assert of(partitioned(double, {"x": "b t n d"}, ("b t n d",))).isdecimal()
    stranger = object()
    assert of(partitioned(lambda x: (stranger and x,), {"x": "b t n d"}, ("b t n d",))).isdecimal()
    assert not names(window, *split())[0].isdecimal()
    monkeypatch.setattr(partition_calls, "_IMPORTED", ())
    assert names(functools.partial(window), *split())[
        0
    ].isdecimal()  # the package's files are no longer those that were imported


@pytest.mark.parametrize(
    "values", [(1, True, 1.0, "1", None, (1,), [1], {1: 1}, np.float32(1), np.dtype("f4"), Tile)]
)
def test_descriptions_tell_values_apart(values):
    assert len({partition_calls._describe(x) for x in values}) == len(values)


def made_in_the_package(*sources):
    """Defines functions as if their source lines were in this package."""
    space = {"__name__": "fsa_jax.somewhere"}
    return [eval(compile(source, "somewhere", "eval"), space) for source in sources]


def test_descriptions_tell_the_functions_of_a_line_apart():
    functions = made_in_the_package(
        "lambda: 1", "lambda: 2", "lambda x=1: 1", "lambda: (lambda: 1)", "lambda: (lambda: 2)",
        "(lambda a: lambda: a)(1)", "(lambda a: lambda: a)(2)",
    )  # fmt: skip
    assert len({partition_calls._describe(x) for x in functions}) == len(functions)
    again = made_in_the_package("lambda: 1")
    assert partition_calls._describe(again[0]) == partition_calls._describe(functions[0])
    with pytest.raises(partition_calls._NotKnown):
        partition_calls._describe(lambda: 1)


@contextlib.contextmanager
def caching(**options):
    """Sets options of jax's persistent cache temporarily."""
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture
def folder(tmp_path):
    """Gives one test its own persistent cache."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    with caching(**options):
        yield tmp_path


@pytest.mark.parametrize("nameless", [False, True])
def test_a_program_on_a_mesh_is_compiled_once(folder, nameless):
    """A program is read from the cache after a restart, and another program gets another entry.

    This also holds when jax is told to leave the names of custom partitioned calls out of its keys.
    """
    mesh = mesh_of("auto", ("data", 2), ("tensor", 2))
    arrays = jax.device_put((QUERY, KEY), NamedSharding(mesh, P("data", None, "tensor")))

    def program(scale):
        jax.clear_caches()

        def of_this_test(query, key):
            return window(query, key, scale=scale)

        out = jax.jit(of_this_test)(*arrays)
        entries = [x.name for x in folder.iterdir() if "of_this_test" in x.name]
        return np.asarray(out), len([x for x in entries if x.endswith("cache")])

    with caching(jax_remove_custom_partitioning_ptr_from_cache_key=nameless):
        first, count = program(0.5)
        assert count == 1
        again, count = program(0.5)
        assert count == 1
        other, count = program(0.25)
        assert count == 2
    np.testing.assert_array_equal(again, first)
    np.testing.assert_allclose(other, window(QUERY, KEY, scale=0.25), atol=1e-6)


def test_a_call_is_compiled_as_it_was_traced():
    """Compilation uses the configuration of the tracing, which is part of the name."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in (QUERY, KEY)]
        rows = NamedSharding(mesh_of("auto", ("data", 2)), P("data"))
        placed = jax.device_put(arrays, rows)
        wanted = window(*arrays)
        lowered = jax.jit(window).lower(*placed)
    compiled = lowered.compile()
    with jax.enable_x64(True):
        np.testing.assert_allclose(compiled(*placed), wanted, rtol=1e-12)


def test_a_program_is_compiled_where_another_one_of_the_same_call_is_gone():
    first = jax.jit(lambda query, key: window(query, key) + 1).lower(*split())
    second = jax.jit(lambda query, key: window(query, key) + 2).lower(*split())
    del first
    jax.clear_caches()
    gc.collect()
    second.compile()


@pytest.mark.parametrize(
    ("cache_home", "before", "enabled", "after"),
    [
        ("/caches", None, True, "/caches/fsa-jax/compiled"),
        ("", None, True, "/home/me/.cache/fsa-jax/compiled"),
        ("relative", None, True, None),
        ("/caches", "/mine", True, "/mine"),
        ("/caches", "", True, ""),
        ("/caches", None, False, None),
    ],
)
def test_where_training_keeps_compiled_programs(cache_home, before, enabled, after, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    monkeypatch.setenv("HOME", "/home/me")
    with caching(jax_compilation_cache_dir=before, jax_enable_compilation_cache=enabled):
        keep_compiled_programs()
        assert getattr(jax.config, "jax_compilation_cache_dir") == after  # noqa: B009
