"""`checkpoint_name`: one name for all that a remat policy must keep of an attention."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import assert_same_bits, normal

import fsa_jax

CONFIG = fsa_jax.NSAConfig(kernel_size=8, kernel_stride=4, block_size=16, topk=3, window_size=7)
QUERY, KEY, GATES = normal(0, 1, 64, 4, 8), normal(1, 1, 64, 2, 8), normal(2, 1, 64, 4, 3)
COMPRESSED = normal(3, 1, 16, 2, 8)
INDICES = jnp.zeros((1, 64, 2, 2), jnp.int32)


def operator(query, key, **options):
    given = (COMPRESSED, COMPRESSED, GATES)
    return fsa_jax.native_sparse_attention(query, key, key, *given, config=CONFIG, **options)


def causal(query, key, **options):
    return fsa_jax.causal_attention(query, key, key, **options)


def window(query, key, **options):
    return fsa_jax.sliding_window_attention(query, key, key, window_size=7, **options)


def selected(query, key, **options):
    return fsa_jax.selected_attention(query, key, key, INDICES, block_size=16, **options)


def compressed(query, key, **options):
    sizes: dict[str, Any] = {"kernel_size": 8, "kernel_stride": 4}
    return fsa_jax.compressed_attention(query, key[:, ::4], key[:, ::4], **sizes, **options)


FUNCTIONS = {
    "operator": (operator, {n for n in fsa_jax.CHECKPOINT_NAMES if not n.startswith("causal")}),
    "causal": (causal, {"causal_out", "causal_lse"}),
    "window": (window, {"window_out", "window_lse"}),
    "selected": (selected, {"selected_out", "selected_lse"}),
    "compressed": (compressed, {"compressed_out", "compressed_lse"}),
}


def names(function, *args, **options):
    """The names in the forward and backward pass."""
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(function(*a, **options) ** 2)))(*args)
    return set(re.findall(r"name\[name=(\w+)\]", str(jaxpr)))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("triton_interpret", marks=pytest.mark.slow)]
)
def test_one_name_takes_the_place_of_all(function, implementation):
    attend, default = FUNCTIONS[function]
    given = {"implementation": implementation}
    assert names(attend, QUERY, KEY, **given) == default
    assert names(attend, QUERY, KEY, **given, checkpoint_name="context") == {"context"}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_dense_definition_has_the_name_too(function):
    attend, _ = FUNCTIONS[function]
    given = {"implementation": "reference", "checkpoint_name": "context"}
    assert names(attend, QUERY, KEY, **given) == {"context"}


@pytest.mark.parametrize("function", [operator, causal])
def test_over_a_sequence_axis(function):
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    given = {"sequence_axis": "sequence"}
    with jax.set_mesh(mesh):
        default = names(function, QUERY, KEY, **given)
        assert default == FUNCTIONS[function.__name__][1]
        assert names(function, QUERY, KEY, **given, checkpoint_name="context") == {"context"}


@pytest.mark.fast_cases("causal", "selected")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_policy_for_the_name_avoids_the_second_forward_pass(function):
    """The backward pass computes attention anew unless the policy knows its name."""
    attend, _ = FUNCTIONS[function]
    keep = jax.checkpoint_policies.save_only_these_names

    def lowered(policy, **options):
        def loss(*args):
            return jnp.sum(attend(*args, **options, implementation="xla") ** 2)

        remat = loss if policy is None else jax.checkpoint(loss, policy=policy)
        return jax.jit(jax.value_and_grad(remat, argnums=(0, 1)))

    def loops(policy, **options):
        return lowered(policy, **options).lower(QUERY, KEY).as_text().count("stablehlo.while")

    context, default = keep("context"), keep(*fsa_jax.CHECKPOINT_NAMES)
    fewest = loops(None)
    assert loops(context, checkpoint_name="context") == fewest
    assert loops(default) == fewest
    assert loops(default, checkpoint_name="context") > fewest
    assert loops(context) > fewest
    if function == "operator":
        got = lowered(context, checkpoint_name="context")(QUERY, KEY)
        assert_same_bits(got, lowered(default)(QUERY, KEY))


def test_results_are_the_same():
    for attend in (window, causal):
        named = functools.partial(attend, checkpoint_name="context")
        np.testing.assert_array_equal(named(QUERY, KEY), attend(QUERY, KEY))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["", 3, ("context",)])
def test_bad_input(function, name):
    attend, _ = FUNCTIONS[function]
    with pytest.raises(ValueError, match="checkpoint_name must be None or a non-empty string, got"):
        attend(QUERY, KEY, checkpoint_name=name)
