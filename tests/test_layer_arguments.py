"""The Flax layers refuse bad options and bad calls, with messages that name the argument."""

import jax.numpy as jnp
import pytest
from flax import nnx
from small_layers import inputs, make

from fsa_jax.layers import FullAttention, NativeSparseAttention

IDS = jnp.ones((1, 8), jnp.int32)


@pytest.mark.parametrize("cls", [NativeSparseAttention, FullAttention])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads must be a positive multiple .*num_heads=4.*=3"),
        ({"num_kv_heads": 0}, "num_heads must be a positive multiple .*num_kv_heads=0"),
        ({"head_dim": 7}, "head_dim must be positive and even .* got 7"),
        ({"implementation": "fast"}, "implementation must be .*'fast'"),
        ({"head_dim": 8.0}, "head_dim must be an integer .* got 8.0"),
        ({"num_kv_heads": "2"}, "num_kv_heads must be an integer .* got '2'"),
        ({"out_features": 0}, "out_features must be an integer of at least 1, got 0"),
        ({"scale": "1"}, "scale must be None or a finite number, not an array, got '1'"),
    ],
)
def test_bad_options(cls, options, message):
    with pytest.raises(ValueError, match=message):
        make(cls, **options)(inputs(length=8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "max"}, "compression must be one of .* got 'max'"),
        ({"gate": "row"}, "gate must be one of .* got 'row'"),
        ({"config": {"topk": 4}}, "config must be an NSAConfig, got {'topk': 4}"),
        ({"kv_per_branch": 1}, "kv_per_branch must be True or False, got 1"),
        ({"sequence_axis": 0}, "sequence_axis must be None or the name of a mesh axis, got 0"),
    ],
)
def test_bad_options_of_nsa(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_default_head_dim():
    with pytest.raises(ValueError, match=r"in_features must be a multiple of num_heads.*30.*4"):
        FullAttention(4, 30, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("cls", [NativeSparseAttention, FullAttention])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": jnp.zeros((8, 16))}, r"x must have shape \[B T C\], got shape \(8, 16\)"),
        ({"x": jnp.zeros((1, 8, 15))}, r"x must have in_features=16 features, got \(1, 8, 15\)"),
        ({"x": jnp.zeros((1, 8, 16), jnp.int32)}, "x must have one of the dtypes .* got int32"),
        ({"segment_ids": IDS[0]}, r"segment_ids must have shape .* got shape \(8,\)"),
        ({"segment_ids": IDS[:, 1:]}, r"segment_ids must have shape .* got \(1, 7\)"),
        (
            {"segment_ids": IDS.astype(jnp.float32)},
            "segment_ids must have an integer dtype .*, got float32",
        ),
        ({"segment_ids": -IDS}, r"segment_ids must be 0 \(padding\) or positive, got -1"),
        ({"positions": IDS[0]}, r"positions must have shape .* got shape \(8,\)"),
        ({"segment_ids": IDS > 0}, "segment_ids must have an integer dtype, got bool"),
        ({"segment_ids": [1] * 8}, r"segment_ids must have shape \[B T\], got shape \(8,\)"),
        ({"positions": "0"}, r"positions must be an integer array of shape \[B T\], got str"),
        ({"x": [[1.0]]}, r"x must be an array of shape \[B T C\], got list"),
        ({"fresh": "yes"}, "fresh must be True or False, got 'yes'"),
        ({"positions": IDS[:, 1:]}, r"positions must have .*\[B T\] of x.*\(1, 7\)"),
        (
            {"positions": IDS.astype(jnp.float32)},
            "positions must have an integer dtype .*, got float32",
        ),
    ],
)
def test_bad_call(cls, arrays, message):
    with pytest.raises(ValueError, match=message):
        make(cls)(**{"x": inputs(length=8)} | arrays)
