"""Memory is linear in the tokens: peak bytes of compiled programs, none of which is run."""

import functools

import jax
import jax.numpy as jnp
import pytest

import fsa_jax
from fsa_jax import NSAConfig

CONFIG = NSAConfig()
LENGTHS = (4096, 16384, 65536)
HEADS, KV_HEADS, WIDTH = 4, 2, 32


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((1, *shape), dtype)


def compress(x, weights, segment_ids):
    return fsa_jax.compress(
        x, kernel_size=32, kernel_stride=16, weights=weights[0], segment_ids=segment_ids
    )


def compressed(query, key, value, segment_ids):
    return fsa_jax.compressed_attention(
        query, key, value, kernel_size=32, kernel_stride=16, segment_ids=segment_ids
    )


def selected(query, key, value, segment_ids, indices):
    return fsa_jax.selected_attention(
        query, key, value, indices, block_size=64, segment_ids=segment_ids
    )


def window(query, key, value, segment_ids):
    return fsa_jax.sliding_window_attention(
        query, key, value, window_size=512, segment_ids=segment_ids
    )


def operator(query, key, value, compressed_key, compressed_value, gates, segment_ids):
    return fsa_jax.native_sparse_attention(
        query,
        key,
        value,
        compressed_key,
        compressed_value,
        gates,
        config=CONFIG,
        segment_ids=segment_ids,
    )


def select(query, key, lse, segment_ids):
    return fsa_jax.select_blocks(query, key, lse, config=CONFIG, segment_ids=segment_ids)


def arguments(function, length):
    """Returns shapes of the arguments, and how many of them are differentiated."""
    query, key = array(length, HEADS, WIDTH), array(length, KV_HEADS, WIDTH)
    short = array(length // 16, KV_HEADS, WIDTH)
    ids = array(length, dtype=jnp.int32)
    return {
        compress: (2, (key, array(KV_HEADS, 32 * WIDTH, WIDTH), ids)),
        compressed: (3, (query, short, short, ids)),
        selected: (3, (query, key, key, ids, array(length, KV_HEADS, 16, dtype=jnp.int32))),
        window: (3, (query, key, key, ids)),
        select: (0, (query, short, array(length, HEADS), ids)),
        operator: (6, (query, key, key, short, short, array(length, HEADS, 3), ids)),
    }[function]


def peak_bytes(function, length):
    """Returns bytes of arguments, results and temporaries of the compiled value and gradients."""
    count, args = arguments(function, length)

    def run(*args):
        if not count:
            return function(*args)
        out, pullback = jax.vjp(lambda *first: function(*first, *args[count:]), *args[:count])
        return out, pullback(out)

    memory = jax.jit(run).lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.fast_cases("compress", "compressed", "select", "window")
@pytest.mark.parametrize(
    "function", [compress, compressed, selected, window, select, operator], ids=lambda f: f.__name__
)
def test_four_times_the_tokens_take_at_most_4_2_times_the_bytes(function):
    small, middle, large = map(functools.partial(peak_bytes, function), LENGTHS)
    print(
        {
            length: bytes_ >> 20
            for length, bytes_ in zip(LENGTHS, (small, middle, large), strict=True)
        }
    )
    assert middle <= 4.2 * small
    assert large <= 4.2 * middle


def test_the_measure_sees_a_quadratic_program():
    """Checks that the measure detects quadratic memory, using the dense reference."""
    dense = functools.partial(fsa_jax.sliding_window_attention, window_size=512)

    def bytes_of(length):
        args = (array(length, 2, 8), array(length, 1, 8), array(length, 1, 8))
        run = jax.jit(functools.partial(dense, implementation="reference"))
        memory = run.lower(*args).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert bytes_of(4096) > 10 * bytes_of(1024)
