"""The Flax layers on a mesh: logical axes of the parameters, and numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_layers import SEGMENT_IDS, inputs, make

from fsa_jax.partitioning import sharding_rules

MESH_RULES = {"embed": "data", "heads": "model", "kv_heads": "model"}


def mesh():
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "specs"),
    [
        (
            {"use_bias": True},
            {
                "query": {"kernel": ("data", "model", None), "bias": ("model", None)},
                "key": {"kernel": ("data", "model", None), "bias": ("model", None)},
                "value": {"kernel": ("data", "model", None), "bias": ("model", None)},
                "out": {"kernel": ("model", None, "data"), "bias": ("data",)},
                "gate": {"kernel": ("data", "model", None), "bias": ("model", None)},
                "compress_key": {
                    "weights": ("model", None, None),
                    "positions": ("model", None, None),
                },
                "compress_value": {"weights": ("model", None, None)},
            },
        ),
        (
            {"compression": "mlp", "gate": "token", "kv_per_branch": True},
            {
                "query": {"kernel": ("data", "model", None)},
                "key": {"kernel": ("data", None, "model", None)},
                "value": {"kernel": ("data", None, "model", None)},
                "out": {"kernel": ("model", None, "data")},
                "gate": {"kernel": ("data", None, None)},
                "compress_key": {
                    "weights": ("model", None, None),
                    "weights_out": ("model", None, None),
                    "positions": ("model", None, None),
                },
                "compress_value": {
                    "weights": ("model", None, None),
                    "weights_out": ("model", None, None),
                },
            },
        ),
    ],
)
def test_sharding(options, specs):
    layer = make(**options)
    graphdef, state = nnx.split(layer)
    with sharding_rules(**MESH_RULES):
        got = nnx.to_pure_dict(nnx.get_partition_spec(state))
        shardings = nnx.get_named_sharding(state, mesh())
    is_spec = lambda x: isinstance(x, jax.P)  # noqa: E731
    assert jax.tree.map(tuple, got, is_leaf=is_spec) == specs
    sharded = jax.device_put(state, shardings)
    kernel = sharded.query.kernel.get_value()
    assert kernel.addressable_shards[0].data.shape == (4, 2, 8)

    x = inputs(batch=4)
    segment_ids = jnp.tile(SEGMENT_IDS, (4, 1))
    rows = jax.NamedSharding(mesh(), jax.P("data"))
    run = jax.jit(lambda state, x, segment_ids: nnx.merge(graphdef, state)(x, segment_ids))
    got = run(sharded, *jax.device_put((x, segment_ids), rows))
    assert len(got.sharding.device_set) == 8
    np.testing.assert_allclose(got, run(state, x, segment_ids), atol=1e-5)


def test_built_under_a_mesh_is_sharded_at_once():
    with jax.set_mesh(mesh()):
        # without sharding rules, parameters are replicated
        assert make().query.kernel.sharding.is_fully_replicated
        with sharding_rules(heads="model"):
            kernel = make().query.kernel.get_value()
    assert kernel.sharding.is_equivalent_to(
        jax.NamedSharding(mesh(), jax.P(None, "model", None)), kernel.ndim
    )
    assert kernel.addressable_shards[0].data.shape == (16, 2, 8)


def test_unknown_logical_axis():
    with (
        pytest.raises(ValueError, match=r"logical axis must be one of .* got 'head'"),
        sharding_rules(head="model"),
    ):
        pass
