"""RoPE: frequencies, the rotation, and its defining property, checked with plain numpy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsa_jax.rope import Llama3Scaling, RoPE

LLAMA3 = RoPE(theta=500000.0, scaling=Llama3Scaling(factor=8.0))


def rotate(x, positions, frequencies):
    """Half-split RoPE, computed one channel pair at a time with complex numbers."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    turned = pairs * np.exp(1j * positions[..., None, None] * frequencies)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_frequencies_without_scaling():
    want = [100.0**-0.0, 100.0**-0.25, 100.0**-0.5, 100.0**-0.75]
    got = RoPE(theta=100.0).inverse_frequencies(8)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_frequencies_with_llama3_scaling():
    # This follows the wording of the rule, case by case.
    want = []
    for frequency in RoPE(theta=500000.0).inverse_frequencies(64).astype(np.float64):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            want.append(frequency)
        elif wavelength > 8192 / 1:
            want.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * frequency / 8 + smooth * frequency)
    assert len({round(f / g, 3) for f, g in itertools.pairwise(want)}) > 2  # all cases occur
    np.testing.assert_allclose(LLAMA3.inverse_frequencies(64), want, rtol=1e-6)


@pytest.mark.parametrize("rope", [RoPE(), LLAMA3])
def test_rotation(rope):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 3000, size=(2, 5), dtype=np.int32)
    want = rotate(x.astype(np.float64), positions, rope.inverse_frequencies(8).astype(np.float64))
    got = rope.apply(jnp.asarray(x), jnp.asarray(positions))
    np.testing.assert_allclose(got, want, atol=1e-3)  # the angles reach 3000 radians in float32


def test_rotation_in_float64(x64):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 6)))
    positions = jnp.asarray([0, 1, 77, 100000], jnp.int32)
    frequencies = RoPE().inverse_frequencies(6).astype(np.float64)
    want = rotate(np.asarray(x), np.asarray(positions), frequencies)
    got = RoPE().apply(x, positions)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, want, atol=1e-9)


def test_only_distance_counts():
    key, query = jax.random.normal(jax.random.key(0), (2, 1, 1, 16))

    def score(query_position, key_position):
        q = RoPE().apply(query[None], jnp.asarray([[query_position]], jnp.int32))
        k = RoPE().apply(key[None], jnp.asarray([[key_position]], jnp.int32))
        return float(jnp.sum(q * k))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_keeps_dtype_and_computes_wide(dtype):
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8)).astype(dtype)
    positions = jnp.asarray([[0, 1, 1000, 30000]], jnp.int32)
    got = RoPE().apply(x, positions)
    assert got.dtype == dtype
    want = RoPE().apply(x.astype(jnp.float32), positions).astype(dtype)
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))
    np.testing.assert_array_equal(got[:, 0].astype(jnp.float32), x[:, 0].astype(jnp.float32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoPE(theta=0.0), "theta must be .* above 0, got 0.0"),
        (lambda: RoPE(theta=math.inf), "theta must be a finite number .* got inf"),
        (lambda: RoPE(theta="big"), "theta must be .* got 'big'"),  # pyright: ignore
        (lambda: RoPE(scaling=8.0), "scaling must be a Llama3Scaling .* got 8.0"),  # pyright: ignore
        (lambda: Llama3Scaling(factor=-1.0), "factor must be .* got -1.0"),
        (lambda: Llama3Scaling(original_max_position=0), "original_max_position must .* got 0"),
        (lambda: Llama3Scaling(high_freq_factor=0.5), "must be above low_freq_factor.*0.5.*1.0"),
        (lambda: RoPE().inverse_frequencies(7), "head_dim must be positive and even .* got 7"),
        (lambda: apply((2, 3, 4), (3,), jnp.int32), r"positions must have the shape .*\(3,\)"),
        (lambda: apply((2, 3, 4), (2,), jnp.float32), "positions must have an integer.*float32"),
        (lambda: apply((2, 3, 5), (2,), jnp.int32), "head_dim must be positive and even .* got 5"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def apply(x_shape, positions_shape, dtype):
    return RoPE().apply(jnp.zeros(x_shape), jnp.zeros(positions_shape, dtype))
