"""Layers with a cache give the outputs of the training forward pass, in any chunks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_layers import CONFIG
from util import assert_errors_are_at_most_twice_those_of_dense

from fsa_jax import NSACache, NSAConfig
from fsa_jax.inference import cached_attention
from fsa_jax.layers import FullAttention, NativeSparseAttention, SlidingWindowAttention
from fsa_jax.rope import Llama3Scaling, RoPE
from inference.cached_layers import BATCH, FEATURES, LENGTH, extend, inputs, make, numbers, whole

#: Tokens per sequence in a call: one, a few, and too many to be served by gathering blocks.
WIDTHS = (1, 5, 24)
assert WIDTHS[1] <= cached_attention.MAX_DECODE_TOKENS < WIDTHS[2]

SCALED = RoPE(theta=5e5, scaling=Llama3Scaling(original_max_position=64))
#: Windows longer than blocks, no forced first block, and a sliding window over all tokens.
LONG_WINDOWS = NSAConfig(
    kernel_size=16,
    kernel_stride=4,
    block_size=8,
    topk=3,
    init_blocks=0,
    local_blocks=1,
    window_size=100,
)
#: Non-overlapping windows of one token, and a sliding window of only the query's own token.
ONE_TOKEN = NSAConfig(
    kernel_size=1,
    kernel_stride=1,
    block_size=4,
    topk=5,
    init_blocks=2,
    local_blocks=0,
    window_size=1,
)
NORMALISED = {"qk_norm": True, "qkv_bias": True, "rope": RoPE(interleaved=True)}
OPTIONS = {
    "default": {},
    "per_branch": {"compression": "mlp", "kv_per_branch": True, "gate": "token", "heads": (4, 4)},
    "weighted": {"compression": "weighted", "use_bias": True, "rope": SCALED, "out_features": 6},
    "mean": {"compression": "mean", "kv_per_branch": True, "rope": None, "heads": (3, 1)},
    "group_of_16": {"heads": (16, 1), "scale": 1.0, "config": LONG_WINDOWS},
    "groups_of_8": {"heads": (16, 2), "compression": "mlp", "config": ONE_TOKEN},
    "after_rope": {"compress_after_rope": True, "kv_per_branch": True, **NORMALISED},
    "full": {"cls": FullAttention, "use_bias": True},
    "window": {"cls": SlidingWindowAttention, "window_size": 7, **NORMALISED},
    "long_window": {"cls": SlidingWindowAttention, "window_size": 100, "heads": (8, 1)},
    "window_of_one": {"cls": SlidingWindowAttention, "window_size": 1},
    "full_group_of_8": {"cls": FullAttention, "heads": (8, 1), "rope": SCALED, "scale": 0.5},
}


def feed(layer, x, cache, at, counts, width, fresh=False):
    """Returns the outputs of each sequence's next tokens; absent tokens are NaN in the input."""
    tokens = np.asarray(x)  # slicing a jax array would compile each slice
    rows = np.full((BATCH, width, x.shape[2]), np.nan, tokens.dtype)
    for row, (start, count) in enumerate(zip(at, counts, strict=True)):
        rows[row, :count] = tokens[row, start : start + count]
    y, cache = extend(layer, jnp.asarray(rows), cache, jnp.asarray(counts, jnp.int32), fresh)
    y = np.asarray(y)
    for row, count in enumerate(counts):
        assert not np.any(y[row, count:])
    return [y[row, :count] for row, count in enumerate(counts)], cache


def run(layer, x, cache, calls, fresh=False):
    """Returns the outputs of all tokens, fed in calls of (width, tokens of each sequence)."""
    at, out = [0] * BATCH, [[] for _ in range(BATCH)]
    for width, counts in calls:
        parts, cache = feed(layer, x, cache, at, counts, width, fresh)
        for row, part in enumerate(parts):
            out[row].append(part)
        at, fresh = [a + n for a, n in zip(at, counts, strict=True)], False
    assert at == [x.shape[1]] * BATCH == cache.lengths.tolist()
    return np.stack([np.concatenate(rows) for rows in out])


@st.composite
def chunkings(draw, widths):
    """Draws calls that feed all tokens of each sequence, in chunks of any size."""
    left, calls = [LENGTH] * BATCH, []
    while any(left):
        # Long series of single-token calls take long and test little.
        width = draw(st.sampled_from(widths[-1:] if len(calls) > 25 else widths))
        most = [min(width, n) for n in left]
        counts = [n if len(calls) > 40 else draw(st.integers(0, n)) for n in most]
        left = [n - count for n, count in zip(left, counts, strict=True)]
        calls.append((width, tuple(counts)))
    return calls


TOKEN_BY_TOKEN = [(1, (1,) * BATCH)] * LENGTH
IN_CHUNKS = [(24, (24,) * BATCH)] * 3
RAGGED = [
    (24, (24, 0)), (5, (1, 5)), (24, (0, 20)), (5, (1, 1)), (5, (0, 1)), (24, (24, 24)),
    (5, (2, 1)), (24, (20, 20)),
]  # fmt: skip


@pytest.mark.fast_cases("full", "full_group_of_8", "window")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_any_chunks_give_the_training_forward(options):
    layer, x = make(**options), inputs()
    want, empty = whole(layer, x), layer.init_cache(BATCH, LENGTH)

    def check(calls):
        np.testing.assert_allclose(run(layer, x, empty, calls), want, atol=1e-5)

    # Every width is compiled, so only the default options use all widths.
    widths = WIDTHS if not options else WIDTHS[::2]
    for calls in (TOKEN_BY_TOKEN, IN_CHUNKS):
        check(calls)
    settings(max_examples=10, deadline=None, database=None)(given(chunkings(widths))(check))()


@pytest.mark.fast_cases("full")
@pytest.mark.parametrize("name", ["default", "per_branch", "full"])
def test_fresh_sequences_run_the_training_forward_and_forget_what_was_there(name):
    layer, x = make(**OPTIONS[name]), inputs()
    used = run_cache(layer, x[:, ::-1], layer.init_cache(BATCH, LENGTH))
    calls = [(24, (24, 13)), *RAGGED[1:3], (24, (24, 24)), (24, (23, 10))]
    np.testing.assert_allclose(run(layer, x, used, calls, fresh=True), whole(layer, x), atol=1e-5)


def run_cache(layer, x, cache):
    """Returns the cache after all tokens have been added."""
    for start in range(0, LENGTH, 24):
        cache = extend(layer, x[:, start : start + 24], cache, None)[1]
    return cache


@pytest.mark.slow
def test_kernels_serve_sequences_of_different_lengths():
    """The training kernels process a chunk, then the decoding kernels process some tokens."""
    config = dataclasses.replace(CONFIG, block_size=16)
    layer, x = make(config=config), inputs()
    want = whole(layer, x)
    kernels = make(config=config)
    kernels.implementation = "triton_interpret"
    cache = layer.init_cache(BATCH, LENGTH)
    at = np.asarray([24, 5])
    cache = feed(layer, x, cache, (0, 0), at, 24)[1]
    for counts, length in (((20, 24), 24), ((1, 3), 3), ((0, 1), 3)):
        parts, cache = feed(kernels, x, cache, at, counts, length)
        for row, part in enumerate(parts):
            np.testing.assert_allclose(part, want[row, at[row] : at[row] + len(part)], atol=1e-5)
        at += counts


def test_numpy_integers_count_as_integers():
    sizes: Any = {"rollback": np.int64(2), "layers": np.uint8(2), "num_pages": np.int32(4)}
    cache = make().init_cache(np.int64(2), np.int16(16), **sizes)
    same = make().init_cache(2, 16, rollback=2, layers=2, num_pages=4)
    assert jax.tree.structure(cache) == jax.tree.structure(same)
    # numpy integers would take part in dtype promotion
    assert (type(cache.rollback), type(cache.layers)) == (int, int)


def test_a_chunk_is_added_once_to_the_cache_that_gave_it():
    cache = make().init_cache(BATCH, LENGTH)
    chunk = cache.place(3, numbers(3, 0))
    after = cache.advance(chunk)
    assert after.lengths.tolist() == [3, 0]
    with pytest.raises(ValueError, match=r"chunk must start .* at \[3, 0\], got \[0, 0\]"):
        after.advance(chunk)
    assert jax.jit(lambda cache: cache.advance(chunk))(after).lost.tolist() == [True, False]
    with pytest.raises(ValueError, match="length must be an integer of at least 1, got 0"):
        cache.place(0)


@pytest.mark.parametrize(
    ("layer", "dtype", "message"),
    [
        ({}, jnp.int8, "dtype must be one of the dtypes float16, .* got int8"),
        ({}, "floaty", "dtype must be one of the dtypes float16, .* got floaty"),
        ({}, 7, "dtype must be one of the dtypes float16, .* got 7"),
        ({}, jnp.float64, "dtype must not be float64 unless jax_enable_x64 is on, got float64"),
        ({}, jnp.bfloat16, "that of the layer's keys, float32 or a wider one, got bfloat16"),
        ({"dtype": jnp.bfloat16}, np.float32, "that of the layer's keys, bfloat16, got float32"),
        ({"cls": FullAttention}, np.float16, "that of the layer's keys, float32 .* got float16"),
    ],
)
def test_a_cache_of_a_dtype_that_no_call_takes(layer, dtype, message):
    with pytest.raises(ValueError, match=message):
        make(**layer).init_cache(BATCH, LENGTH, dtype=dtype)


@pytest.mark.slow
def test_a_cache_of_the_dtype_of_the_keys(x64):
    """The dtype of x decides where the layer has none and the parameters have a narrower one."""
    layer = FullAttention(4, FEATURES, implementation="xla", rngs=nnx.Rngs(0))
    for dtype in (jnp.float32, "float64"):
        x = inputs(dtype)[:, :1]
        with jax.numpy_dtype_promotion("standard"):
            _, cache = layer(x, cache=layer.init_cache(BATCH, LENGTH, dtype=dtype))
        assert cache.key.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("cls", [NativeSparseAttention, FullAttention])
def test_error_rule_in_bfloat16(cls, x64):
    """All blocks are selected, because a choice that rounding flips is not an attention error."""
    dtype, dense_choice = jnp.bfloat16, "xla" if cls is FullAttention else "reference"
    config = dataclasses.replace(CONFIG, topk=LENGTH // CONFIG.block_size)
    options = {} if cls is FullAttention else {"config": config}
    # Parameters and tokens are rounded to the low precision in all three layers.
    layers = [make(cls, param_dtype=jnp.float64, dtype=d, **options) for d in (dtype, jnp.float64)]
    for layer in layers:
        state = jax.tree.map(lambda p: p.astype(dtype).astype(jnp.float64), nnx.state(layer))
        nnx.update(layer, state)
    ours, exact = layers
    x = inputs(dtype)
    dense = nnx.merge(*nnx.split(ours))
    dense.implementation = exact.implementation = dense_choice
    arrays = whole(dense, x), whole(exact, x.astype(jnp.float64))
    for calls in (TOKEN_BY_TOKEN, IN_CHUNKS):
        got = run(ours, x, ours.init_cache(BATCH, LENGTH), calls)
        assert_errors_are_at_most_twice_those_of_dense(got, *arrays)


@pytest.mark.fast_cases("full")
@pytest.mark.parametrize("name", ["default", "full"])
def test_a_step_works_in_place_and_reads_what_it_needs(name):
    """A decoding step reads a few blocks, the window and the compressed keys, not all the cache."""
    config = dataclasses.replace(CONFIG, kernel_size=32, kernel_stride=16, block_size=64)
    layer = make(**OPTIONS[name] | ({"config": config} if name == "default" else {}))
    graphdef, state = nnx.split(layer)

    def step(state, x, cache):
        return nnx.merge(graphdef, state)(x, cache=cache)

    def cost(capacity, x):
        cache = layer.init_cache(1, capacity)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        compiled: Any = jax.jit(step, donate_argnums=2).lower(state, x, cache).compile()
        memory = compiled.memory_analysis()
        # the new cache reuses the old one's memory
        assert memory.alias_size_in_bytes >= 0.99 * size
        return compiled.cost_analysis()["flops"], memory.temp_size_in_bytes, size

    x = jnp.zeros((1, 1, FEATURES))
    (near, _, _), (far, scratch, size) = (cost(capacity, x) for capacity in (2048, 32768))
    products = 2 * 4 * 8 * 2 * (32768 - 2048)  # q k and p v for four heads of width 8
    if name == "full":
        assert products < far - near < 3 * products
        return
    # Only compressed keys grow with the tokens; they are read twice, the second time for scores.
    assert far - near < 3 * products / config.kernel_stride
    assert scratch < size / 8


def test_a_donated_cache_becomes_the_new_one():
    layer = make()
    graphdef, state = nnx.split(layer)
    cache = layer.init_cache(BATCH, LENGTH)
    step = jax.jit(
        lambda state, x, cache: nnx.merge(graphdef, state)(x, cache=cache), donate_argnums=2
    )
    _, new = step(state, inputs()[:, :5], cache)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert new.lengths.tolist() == [5, 5]
    for use in (lambda: layer(inputs(), cache=cache), lambda: cache.rewind(numbers(1, 1))):
        with pytest.raises(ValueError, match="cache must not have been donated, got one that"):
            use()


def test_bad_calls():
    layer, x = make(), inputs()
    cache = layer.init_cache(BATCH, LENGTH)
    ids = jnp.ones((BATCH, LENGTH), jnp.int32)
    sizes: Any = {"config": CONFIG, "num_kv_heads": 2, "head_dim": 8}
    for options, message in [
        ({"cache": cache, "segment_ids": ids}, r"segment_ids must not be given with a cache, got"),
        ({"cache": cache, "positions": ids}, r"positions must not be given with a cache, got"),
        ({"num_tokens": ids[:, 0]}, r"num_tokens must not be given without a cache, got \(2,\)"),
        ({"fresh": True}, r"fresh must not be given without a cache, got True"),
        ({"cache": 3}, r"cache must be what init_cache gives, got int"),
        ({"cache": cache, "num_tokens": ids[0]}, r"num_tokens must .* 2 sequences .* \(72,\)"),
        (
            {"cache": cache, "num_tokens": ids[:, 0] * -1},
            r"num_tokens must be in 0 \.\. 72, got \[-1, -1\]",
        ),
        (
            {"cache": cache, "num_tokens": ids[:, 0] * 73},
            r"num_tokens must be in 0 \.\. 72, got \[73, 73\]",
        ),
        ({"cache": layer.init_cache(3, 8)}, r"cache must have sequences=2, got sequences=3"),
        ({"cache": layer.init_cache(2, 8, layers=2)}, r"cache must have layers=1, got layers=2"),
        (
            {"cache": NSACache.init(2, 72, dtype=jnp.bfloat16, **sizes)},
            r"cache must have the dtype of the layer's keys, got bfloat16 and float32",
        ),
        (
            {"cache": make(FullAttention).init_cache(2, 8)},
            r"cache must have kind=NSACache, got kind=KVCache",
        ),
        (
            {"cache": make(heads=(4, 1)).init_cache(2, 8)},
            r"cache must have num_kv_heads=2, got num_kv_heads=1",
        ),
        (
            {"cache": make(head_dim=4).init_cache(2, 8)},
            r"cache must have head_dim=8, got head_dim=4",
        ),
        (
            {"cache": make(kv_per_branch=True).init_cache(2, 8)},
            r"cache must have window_of_its_own=False, got window_of_its_own=True",
        ),
        (
            {"cache": make(config=dataclasses.replace(CONFIG, window_size=7)).init_cache(2, 8)},
            r"cache must have config=.*window_size=6.* got .*window_size=7",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(x, **options)
    filled = dataclasses.replace(cache, lengths=jnp.asarray([0, 3], jnp.int32))
    with pytest.raises(ValueError, match=r"room for 72 .* sequence 1, which holds 3 .* 70 more"):
        layer(x, cache=filled, num_tokens=jnp.asarray([72, 70], jnp.int32))
    with pytest.raises(ValueError, match=r"x must have in_features=16 features, got \(2, 72, 15\)"):
        layer(x[..., :15], cache=cache)
    with pytest.raises(ValueError, match=r"x must have no empty axis, got shape \(2, 0, 16\)"):
        layer(x[:, :0], cache=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"capacity": 1.5}, r"capacity must be an integer of at least 1, got 1\.5"),
        ({"num_pages": 0}, "num_pages must be an integer of at least 1, got 0"),
        ({"rollback": -1}, "rollback must be an integer of at least 0, got -1"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        make().init_cache(**{"batch": 1, "capacity": 8} | options)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (NativeSparseAttention, {"implementation": "reference"}, "implementation='reference'"),
        (NativeSparseAttention, {"implementation": "triton"}, "implementation='triton'"),
        (NativeSparseAttention, {"sequence_axis": "tokens"}, "sequence_axis='tokens'"),
        (FullAttention, {"implementation": "cudnn"}, "implementation='cudnn'"),
    ],
)
def test_layers_that_cannot_serve_a_cache(cls, options, message):
    layer = make(cls)
    cache = layer.init_cache(BATCH, LENGTH)
    for name, value in options.items():
        setattr(layer, name, value)
    with pytest.raises(NotImplementedError, match=f"{message} cannot serve"):
        layer(inputs()[:, :1], cache=cache)


@pytest.mark.slow
def test_tokens_without_room_are_not_stored_inside_jit():
    layer, x = make(), inputs()
    cache = layer.init_cache(BATCH, LENGTH)
    for counts in ((24, 20), (24, 24), (24, 24)):
        _, cache = feed(layer, x, cache, (0, 0), counts, 24)
    y, cache = extend(layer, x[:, :24], cache, jnp.asarray([24, 24], jnp.int32))
    assert cache.lengths.tolist() == [LENGTH, LENGTH]
    assert not np.any(y[0])
    assert not np.any(y[1, 4:])
    assert np.all(np.any(y[1, :4], axis=-1))
