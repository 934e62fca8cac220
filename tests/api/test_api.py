"""The public functions: arguments, errors, choice of implementation."""

import dataclasses
import functools
import json
import logging
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import normal

import fsa_jax
from fsa_jax import NSAConfig
from fsa_jax.pallas import SelectedTuning, support

SMALL = NSAConfig(kernel_size=8, kernel_stride=4, block_size=8, topk=4, window_size=9)
WINDOWS: dict[str, Any] = {"kernel_size": 8, "kernel_stride": 4}
QUERY, KEY = normal(0, 2, 40, 4, 6), normal(1, 2, 40, 2, 6)
COMPRESSED = normal(2, 2, 10, 2, 6)
GATES = normal(3, 2, 40, 4, 3)
LSE = jnp.zeros((2, 40, 4))
INDICES = jnp.zeros((2, 40, 2, 3), jnp.int32)
SEGMENTS = jnp.ones((2, 40), jnp.int32)
WEIGHTS = jnp.ones((2, 8 * 6, 6))

GOOD: dict[str, dict[str, Any]] = {
    "compress": {"x": KEY, **WINDOWS, "weights": WEIGHTS, "segment_ids": SEGMENTS},
    "compressed_attention": {
        "query": QUERY,
        "compressed_key": COMPRESSED,
        "compressed_value": COMPRESSED,
        **WINDOWS,
        "segment_ids": SEGMENTS,
    },
    "select_blocks": {
        "query": QUERY,
        "compressed_key": COMPRESSED,
        "lse": LSE,
        "config": SMALL,
        "segment_ids": SEGMENTS,
    },
    "selected_attention": {
        "query": QUERY,
        "key": KEY,
        "value": KEY,
        "block_indices": INDICES,
        "block_size": 8,
        "segment_ids": SEGMENTS,
    },
    "sliding_window_attention": {
        "query": QUERY,
        "key": KEY,
        "value": KEY,
        "window_size": 9,
        "segment_ids": SEGMENTS,
    },
    "native_sparse_attention": {
        "query": QUERY,
        "key": KEY,
        "value": KEY,
        "compressed_key": COMPRESSED,
        "compressed_value": COMPRESSED,
        "gates": GATES,
        "config": SMALL,
        "segment_ids": SEGMENTS,
    },
    "causal_attention": {"query": QUERY, "key": KEY, "value": KEY, "segment_ids": SEGMENTS},
}

# Each entry has the function, the bad arguments, and words that the message must contain.
BAD = [
    ("selected_attention", {"query": QUERY[0]}, ["key", "[T K D]", "(2, 40, 2, 6)"]),
    ("selected_attention", {"query": QUERY[0, 0]}, ["query", "[B T N D]", "(4, 6)"]),
    ("selected_attention", {"query": 3.0}, ["query", "array", "float"]),
    ("selected_attention", {"query": QUERY[:, :0]}, ["query", "empty", "(2, 0, 4, 6)"]),
    ("selected_attention", {"key": KEY[:, :20]}, ["key", "B T", "(2, 20, 2, 6)"]),
    ("selected_attention", {"value": KEY[:, :, :1]}, ["value", "key", "(2, 40, 1, 6)"]),
    ("selected_attention", {"query": QUERY[:, :, :3]}, ["heads", "multiple", "3 and 2"]),
    ("selected_attention", {"query": QUERY[..., :5]}, ["query", "key", "head width", "5 and 6"]),
    ("selected_attention", {"key": KEY.astype(jnp.bfloat16)}, ["key", "dtype", "bfloat16"]),
    ("selected_attention", {"query": INDICES}, ["query", "dtypes", "int32"]),
    (
        "selected_attention",
        {"block_indices": INDICES.astype(jnp.float32)},
        ["block_indices", "int32", "float32"],
    ),
    ("selected_attention", {"block_indices": INDICES > 0}, ["block_indices", "integer", "bool"]),
    ("selected_attention", {"block_indices": INDICES[:, :5]}, ["block_indices", "(2, 5, 2, 3)"]),
    ("selected_attention", {"block_indices": INDICES[0]}, ["block_indices", "(40, 2, 3)"]),
    ("selected_attention", {"block_size": 0}, ["block_size", "at least 1", "0"]),
    ("selected_attention", {"block_size": 8.0}, ["block_size", "integer", "8.0"]),
    ("selected_attention", {"scale": float("nan")}, ["scale", "finite", "nan"]),
    ("selected_attention", {"scale": "1"}, ["scale", "number", "'1'"]),
    ("selected_attention", {"segment_ids": -SEGMENTS}, ["segment_ids", "0", "positive", "-1"]),
    ("selected_attention", {"segment_ids": SEGMENTS[:, :9]}, ["segment_ids", "(2, 40)", "(2, 9)"]),
    (
        "selected_attention",
        {"segment_ids": SEGMENTS.astype(jnp.float32)},
        ["segment_ids", "int32", "float32"],
    ),
    ("selected_attention", {"segment_ids": SEGMENTS > 0}, ["segment_ids", "bool", "astype"]),
    (
        "selected_attention",
        {"segment_ids": np.full((2, 40), 2**31)},
        ["segment_ids", "int32", "2147483648"],
    ),
    ("selected_attention", {"segment_ids": [[1] * 40, [1]]}, ["segment_ids", "[B T]", "lists"]),
    ("selected_attention", {"segment_ids": [["a"] * 40] * 2}, ["segment_ids", "integer", "<U1"]),
    ("selected_attention", {"segment_ids": "ids"}, ["segment_ids", "[B T]", "str"]),
    ("selected_attention", {"segment_ids": 1}, ["segment_ids", "[B T]", "int"]),
    ("selected_attention", {"key": [[1.0]]}, ["key", "array", "list"]),
    ("selected_attention", {"block_size": "8"}, ["block_size", "integer", "'8'"]),
    ("selected_attention", {"block_size": jnp.asarray(8)}, ["block_size", "integer", "int32[]"]),
    ("selected_attention", {"scale": jnp.asarray(1.0)}, ["scale", "number", "float32[]"]),
    ("selected_attention", {"scale": True}, ["scale", "number", "True"]),
    ("selected_attention", {"scale": 10**400}, ["scale", "finite", "1000"]),
    ("selected_attention", {"return_residuals": "no"}, ["return_residuals", "True", "'no'"]),
    ("selected_attention", {"implementation": np.ones(2)}, ["implementation", "'xla'", "float64"]),
    ("selected_attention", {"implementation": 3}, ["implementation", "'xla'", "3"]),
    ("selected_attention", {"implementation": "cuda"}, ["implementation", "'xla'", "'cuda'"]),
    ("sliding_window_attention", {"window_size": 0}, ["window_size", "at least 1", "0"]),
    ("sliding_window_attention", {"window_size": True}, ["window_size", "integer", "True"]),
    ("sliding_window_attention", {"window_size": None}, ["window_size", "integer", "None"]),
    (
        "compressed_attention",
        {"kernel_stride": 3},
        ["kernel_size", "multiple", "kernel_stride", "8", "3"],
    ),
    ("compressed_attention", {"compressed_key": KEY}, ["compressed_key", "compressed_value"]),
    (
        "compressed_attention",
        {"compressed_key": KEY, "compressed_value": KEY},
        ["compressed_key", "40 // 4 = 10", "40"],
    ),
    ("select_blocks", {"lse": LSE[..., :2]}, ["lse", "query", "(2, 40, 2)"]),
    ("select_blocks", {"config": {"topk": 4}}, ["config", "NSAConfig", "topk"]),
    (
        "native_sparse_attention",
        {"gates": GATES[..., :2]},
        ["gates", "(2, 40, 4, 3)", "(2, 40, 4, 2)"],
    ),
    (
        "native_sparse_attention",
        {"gates": GATES[:, :, :2]},
        ["gates", "(2, 40, 1, 3)", "(2, 40, 2, 3)"],
    ),
    (
        "native_sparse_attention",
        {"compressed_value": COMPRESSED[..., :5]},
        ["compressed_value", "head width of value", "5 and 6"],
    ),
    ("compress", {"x": KEY[0, 0]}, ["x", "[B T K D]", "(2, 6)"]),
    ("compress", {"method": "max"}, ["method", "'linear'", "'max'"]),
    ("compress", {"method": WEIGHTS}, ["method", "'linear'", "float32[2, 48, 6]"]),
    ("compress", {"kernel_stride": 4.0}, ["kernel_stride", "integer", "4.0"]),
    ("compress", {"sequence_axis": 0}, ["sequence_axis", "name", "0"]),
    ("compress", {"weights": None}, ["weights", "(2, 48, 6)", "None"]),
    ("compress", {"weights": WEIGHTS[:, :9]}, ["weights", "(2, 48, 6)", "(2, 9, 6)"]),
    ("compress", {"weights": WEIGHTS.astype(jnp.bfloat16)}, ["weights", "float32", "bfloat16"]),
    ("compress", {"method": "mean"}, ["weights", "None", "mean"]),
    ("compress", {"method": "mlp"}, ["weights", "pair", "mlp"]),
    (
        "compress",
        {"method": "mlp", "weights": (WEIGHTS, WEIGHTS)},
        ["weights[0]", "(2, 48, 48)", "(2, 48, 6)"],
    ),
    ("compress", {"positions": WEIGHTS}, ["positions", "(2, 8, 6)", "(2, 48, 6)"]),
    ("compress", {"kernel_size": 6}, ["kernel_size", "multiple", "6", "4"]),
]


@pytest.mark.parametrize(("function", "changed", "words"), BAD)
def test_bad_input_is_named_with_its_value_and_the_rule(function, changed, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        getattr(fsa_jax, function)(**GOOD[function] | changed)
    for word in words:
        assert word in str(error.value)


KINDS = {
    "numpy int64": lambda ids: np.asarray(ids, np.int64),
    "numpy uint8": lambda ids: np.asarray(ids, np.uint8),
    "int8": lambda ids: ids.astype(jnp.int8),
    "uint32": lambda ids: ids.astype(jnp.uint32),
    "lists": lambda ids: ids.tolist(),
    "lists of NumPy's integers": lambda ids: [list(row) for row in np.asarray(ids)],
}
DOCUMENTS = jnp.asarray([[1] * 13 + [2] * 20 + [0] * 7, [3] * 40], jnp.int32)


def window_of(segment_ids):
    arguments = GOOD["sliding_window_attention"] | {"segment_ids": segment_ids}
    return fsa_jax.sliding_window_attention(**arguments)


@pytest.mark.fast_cases("lists")
@pytest.mark.parametrize("kind", KINDS)
def test_segment_ids_may_be_integers_of_any_kind(kind):
    ids = KINDS[kind](DOCUMENTS)
    np.testing.assert_array_equal(window_of(ids), window_of(DOCUMENTS))
    without_ids = GOOD["native_sparse_attention"].copy()
    del without_ids["segment_ids"]
    shared: dict[str, Any] = {**WINDOWS, "method": "mean"}
    np.testing.assert_array_equal(
        fsa_jax.compress(KEY, **shared, segment_ids=ids),
        fsa_jax.compress(KEY, **shared, segment_ids=DOCUMENTS),
    )
    run = functools.partial(fsa_jax.native_sparse_attention, **without_ids)
    np.testing.assert_array_equal(run(segment_ids=ids), run(segment_ids=DOCUMENTS))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.int64, jnp.uint32, jnp.uint64])
def test_ids_too_large_for_int32_stay_apart_inside_jit(dtype):
    """Inside jit, ids that differ only above bit 31 must still be two documents."""
    big = 2**31 if dtype == jnp.uint32 else 2**40
    ids = DOCUMENTS.astype(dtype)
    ids = jnp.where(ids == 2, jnp.asarray(1 + big, dtype), ids)
    np.testing.assert_array_equal(jax.jit(window_of)(ids), window_of(DOCUMENTS))
    with pytest.raises(ValueError, match=f"segment_ids must hold integers that int32.*{1 + big}"):
        window_of(ids)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_block_numbers_beyond_int32_are_ignored_like_all_out_of_range(transform, kind):
    lists = np.broadcast_to(np.asarray([0, 3, 2**40]), (2, 40, 2, 3)).astype(np.int64)
    few = jnp.asarray(np.where(lists > 9, -(2**31), lists), jnp.int32)

    def run(indices):
        arguments = GOOD["selected_attention"] | {"block_indices": indices}
        return fsa_jax.selected_attention(**arguments)

    np.testing.assert_array_equal(transform(run)(kind(lists)), run(few))
    cut = np.where(lists > 9, 2**32 + 1, -1)  # truncated to 32 bits, this entry would be block 1
    np.testing.assert_array_equal(transform(run)(kind(cut)), run(few * 0 - 1))


def test_scalars_of_numpy_are_numbers():
    arguments: dict[str, Any] = GOOD["selected_attention"]
    want = fsa_jax.selected_attention(**arguments, scale=0.5)
    for scale in (np.float32(0.5), np.float16(0.5)):
        both = arguments | {"block_size": np.int64(8), "return_residuals": np.bool_(True)}
        np.testing.assert_array_equal(fsa_jax.selected_attention(**both, scale=scale)[0], want)
    one = fsa_jax.selected_attention(**arguments, scale=np.int64(1))
    np.testing.assert_array_equal(one, fsa_jax.selected_attention(**arguments, scale=1.0))
    config = NSAConfig(topk=np.int64(8), window_size=np.uint8(9))  # pyright: ignore
    assert config == NSAConfig(topk=8, window_size=9)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["topk"] == 8
    assert SelectedTuning(pairs=np.int64(4)) == SelectedTuning(pairs=4)  # pyright: ignore


@pytest.mark.parametrize("function", [fsa_jax.to_zigzag, fsa_jax.from_zigzag])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones(8), 0, 0), "devices must be an integer of at least 1, got 0"),
        ((jnp.ones(8), 2.0, 0), "devices must be an integer .* got 2.0"),
        ((jnp.ones(8), 2, 1), "axis must be an integer from -1 to 0, got 1"),
        (([1] * 8, 2, 0), "x must be an array with an axis of tokens, got"),
        ((jnp.ones(7), 2, 0), r"tokens must be a multiple of 2 \* devices = 4, got 7"),
    ],
)
def test_bad_zigzag(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_import_loads_no_kernels():
    """Importing Pallas takes as long as importing jax and flax together."""
    code = """
import sys, fsa_jax, fsa_jax.layers, fsa_jax.transformer
for module in ("jax.experimental.pallas", "jax.experimental.mosaic", "orbax", "grain"):
    assert module not in sys.modules, module
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("function", GOOD)
def test_good_input_is_served(function):
    out = getattr(fsa_jax, function)(**GOOD[function])
    assert np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"block_size": 24}, ["block_size", "multiple", "kernel_stride", "24", "16"]),
        ({"kernel_size": 24}, ["kernel_size", "multiple", "kernel_stride", "24", "16"]),
        ({"topk": 2}, ["topk", "init_blocks + local_blocks", "2", "1"]),
        ({"window_size": 0}, ["window_size", "at least 1", "0"]),
        ({"topk": 16.0}, ["topk", "integer", "16.0"]),
        ({"init_blocks": -1}, ["init_blocks", "at least 0", "-1"]),
        ({"kernel_stride": True}, ["kernel_stride", "integer", "True"]),
        ({"block_size": "64"}, ["block_size", "integer", "'64'"]),
        ({"block_size": np.zeros(2, int)}, ["block_size", "integer", "int64[2]"]),
    ],
)
def test_a_bad_config_is_refused_when_built(changed, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        NSAConfig(**changed)
    for word in words:
        assert word in str(error.value)


def test_negative_ids_are_padding_where_values_cannot_be_read():
    """Inside jit no error can depend on values, so a negative id is treated as padding."""
    arguments = GOOD["selected_attention"]

    def run(segment_ids):
        return fsa_jax.selected_attention(**arguments | {"segment_ids": segment_ids})

    ids = SEGMENTS.at[:, 30:].set(-5)
    np.testing.assert_array_equal(jax.jit(run)(ids), run(jnp.maximum(ids, 0)))


@pytest.mark.parametrize("function", [f for f in GOOD if f != "compress"])
def test_a_named_implementation_that_cannot_serve_says_so(function):
    with pytest.raises(NotImplementedError, match=f"triton.*{function}.*need an NVIDIA GPU"):
        getattr(fsa_jax, function)(**GOOD[function], implementation="triton")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("function", [f for f in GOOD if f != "compress"])
def test_arrays_that_the_kernels_do_not_take_are_named(function):
    wide = {
        name: x.astype(jnp.float64)
        for name, x in GOOD[function].items()
        if isinstance(x, jax.Array) and x.dtype == jnp.float32
    }
    with pytest.raises(NotImplementedError, match=f"{function}.*the dtype must be.*got float64"):
        getattr(fsa_jax, function)(**GOOD[function] | wide, implementation="triton_interpret")
    assert np.isfinite(getattr(fsa_jax, function)(**GOOD[function] | wide)).all()


def test_the_default_choice_is_logged_once_for_each_reason(caplog, monkeypatch):
    """Uses a compute capability that no other test uses, so nothing has been logged for it yet."""
    monkeypatch.setattr(support, "capability", lambda: 61)
    with caplog.at_level(logging.INFO, logger="fsa_jax"):
        for _ in range(3):
            fsa_jax.selected_attention(**GOOD["selected_attention"])
            fsa_jax.selected_attention(**GOOD["selected_attention"], implementation="xla")
            fsa_jax.explain()
    assert [record.getMessage() for record in caplog.records] == [
        "selected_attention uses implementation 'xla': "
        "the kernels need compute capability 8.0, the GPU has 6.1"
    ]


def test_explain_names_every_function():
    assert list(fsa_jax.explain()) == list(GOOD)
    assert fsa_jax.explain("reference")["select_blocks"] == ("reference", "named by the caller")
    implementation, reason = fsa_jax.explain()["selected_attention"]
    assert implementation == "xla"
    assert "need an NVIDIA GPU" in reason
    with pytest.raises(NotImplementedError):
        fsa_jax.explain("triton")
    with pytest.raises(ValueError, match=r"implementation must be one of .*'reference'.*got 3"):
        fsa_jax.explain(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("tuning", "implementation", "message"),
    [
        ({"pairs": 4}, None, "tuning must be None or a SelectedTuning, got {'pairs': 4}"),
        (SelectedTuning(), "xla", "tuning must be None for implementation='xla'"),
    ],
)
def test_bad_tuning_is_refused(tuning, implementation, message):
    arguments = GOOD["selected_attention"] | {"tuning": tuning}
    with pytest.raises(ValueError, match=message):
        fsa_jax.selected_attention(**arguments, implementation=implementation)


@pytest.mark.parametrize("function", GOOD)
def test_the_batch_axis_may_be_left_out(function):
    arguments = GOOD[function]
    shared = ("weights", "positions", "config")
    one = {
        k: v[0] if isinstance(v, jax.Array) and k not in shared else v for k, v in arguments.items()
    }
    call = jax.jit(functools.partial(getattr(fsa_jax, function), **one))
    np.testing.assert_allclose(
        call(), getattr(fsa_jax, function)(**arguments)[0], rtol=1e-5, atol=1e-6
    )


def test_sizes_beyond_all_rows():
    """Sizes beyond any sequence length or 31 bits give no window, all keys, or a clear error."""
    for size in (96, 2**31 - 16):
        sizes = {"kernel_size": size, "kernel_stride": 16}
        assert not np.asarray(fsa_jax.window_positions([1] * 40 + [2] * 24, **sizes)).any()
        assert not np.asarray(
            fsa_jax.compress(jnp.ones((1, 64, 1, 8)), method="mean", **sizes)
        ).any()
    x = jnp.ones((1, 20, 1, 8))
    for function in (fsa_jax.sliding_window_attention, fsa_jax.causal_attention):
        assert function(x, x, x, window_size=2**31 - 1).shape == x.shape
        with pytest.raises(
            ValueError, match=r"window_size must be an integer from 1 to 2147483647"
        ):
            function(x, x, x, window_size=2**31)
    with pytest.raises(ValueError, match=r"scale must be None or a finite number.*1e\+39"):
        fsa_jax.causal_attention(x, x, x, scale=1e39)
    with pytest.raises(ValueError, match=r"segment_ids must be integers .*, got None"):
        fsa_jax.token_positions(None)  # pyright: ignore[reportArgumentType]
    objects = np.full((1, 20, 1, 8), None)
    with pytest.raises(ValueError, match=r"query must have one of the dtypes .*, got object"):
        fsa_jax.causal_attention(objects, x, x)
