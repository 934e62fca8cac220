"""RoPE: frequencies, the rotation, and its defining property, checked with plain numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsa_jax.rope import Llama3Scaling, RoPE, RotaryEmbedding, YarnScaling

LLAMA3 = RoPE(theta=500000.0, scaling=Llama3Scaling(factor=8.0))
YARN = RoPE(scaling=YarnScaling(factor=4.0, original_max_position=512))


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


@pytest.mark.parametrize("rope", [RoPE(), LLAMA3, YARN])
def test_rotation(rope):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 3000, size=(2, 5), dtype=np.int32)
    want = rotate(x.astype(np.float64), positions, rope.inverse_frequencies(8).astype(np.float64))
    if rope is YARN:
        want *= 0.1 * math.log(4.0) + 1
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


@pytest.mark.parametrize("scaled", [RoPE(), LLAMA3, YARN])
def test_interleaved_pairs_neighbouring_channels(scaled):
    interleaved = dataclasses.replace(scaled, interleaved=True)
    query, key = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 8))
    positions = jnp.asarray([[0, 1, 2, 50, 51], [7, 8, 9, 10, 400]], jnp.int32)
    halves = np.asarray([0, 2, 4, 6, 1, 3, 5, 7])  # the order for pairs across the two halves
    turned = {}
    for name, x in {"query": query, "key": key}.items():
        got = interleaved.apply(x, positions)
        np.testing.assert_array_equal(got[..., halves], scaled.apply(x[..., halves], positions))
        assert np.any(got != scaled.apply(x, positions))
        turned[name] = got, scaled.apply(x[..., halves], positions)
    logits = [
        np.einsum("btnd,bsnd->bnts", np.float64(turned["query"][i]), np.float64(turned["key"][i]))
        for i in range(2)
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-12)


def test_interleaved_pair_by_pair():
    x = np.random.default_rng(3).normal(size=(3, 1, 6)).astype(np.float32)
    got = RoPE(theta=100.0, interleaved=True).apply(jnp.asarray(x), jnp.arange(3, dtype=jnp.int32))
    for position in range(3):
        for c in range(3):
            angle = position * 100.0 ** (-2 * c / 6)
            first, second = x[position, 0, 2 * c : 2 * c + 2].astype(np.float64)
            want = [
                first * math.cos(angle) - second * math.sin(angle),
                second * math.cos(angle) + first * math.sin(angle),
            ]
            np.testing.assert_allclose(got[position, 0, 2 * c : 2 * c + 2], want, atol=1e-6)


def test_embeddings_are_static_metadata():
    for rope in (RoPE(), LLAMA3, YARN):
        assert isinstance(rope, RotaryEmbedding)
        same = dataclasses.replace(rope)
        assert same == rope
        assert hash(same) == hash(rope)
        assert rope != dataclasses.replace(rope, interleaved=True)
    assert not isinstance(lambda x, positions: x, RotaryEmbedding)


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
        (lambda: RoPE(scaling=8.0), "scaling must be a LinearScaling, .* got 8.0"),  # pyright: ignore
        (lambda: RoPE(theta=1.0, scaling=YARN.scaling), "theta must be above 1 .* got 1.0"),
        (lambda: RoPE(interleaved=1), "interleaved must be True or False, got 1"),  # pyright: ignore
        (lambda: RoPE().check(0), "head_dim must be an integer of at least 1, got 0"),
        (lambda: YARN.check(5), "head_dim must be positive and even .* got 5"),
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
