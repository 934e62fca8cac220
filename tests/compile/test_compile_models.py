"""Layers and whole training steps compiled for a GPU: memory, and no copies of queries."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from compile.programs import LLAMA_LAYER
from fsa_jax.bench.ahead_of_time import compile_for
from fsa_jax.layers import FullAttention, NativeSparseAttention
from fsa_jax.training.config import PRESETS
from fsa_jax.training.step import abstract_model, init_state, make_train_step

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("empty_kernels")]
GIB = 2**30
SMALL = PRESETS["small"]


def training_step(config):
    """Compiles a training step for an H200; returns its peak bytes and its text."""
    graphdef, params = abstract_model(config.model)
    state = jax.eval_shape(functools.partial(init_state, config=config), params)
    ids = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
    compiled = compile_for("H200", make_train_step(graphdef, config), state, ids, ids)
    found, text = compiled.memory_analysis(), compiled.as_text()
    assert found is not None
    assert text is not None
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes, text


@pytest.mark.parametrize(
    ("config", "limit", "ranges", "selection"),
    [  # head widths 64 and 128
        (SMALL, 20 * GIB, "range", ("score", "choose")),
        (LLAMA_LAYER, 40 * GIB, "hopper", ("compressed_fold", "compressed_choose")),
    ],
    ids=["small", "llama"],
)
def test_memory_of_a_training_step(config, limit, ranges, selection):
    """The limits are the README's figures, with some margin for other compiler versions."""
    peak, text = training_step(config)
    print(f"{peak / GIB:.1f} GiB")
    assert limit / 3 < peak < limit
    for kernel in (f"{ranges}_forward", *selection, "backward", f"{ranges}_key_gradient"):
        assert f"{kernel}_kernel" in text


@pytest.mark.essential
def test_no_copy_of_queries_between_the_kernels_of_a_layer():
    """All kernels take [B, T, N, D], the layout that the projections produce."""
    length, heads, kv_heads, width = 16384, 16, 4, 128

    def build():
        return NativeSparseAttention(
            heads,
            1024,
            num_kv_heads=kv_heads,
            head_dim=width,
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
            implementation="triton",
            rngs=nnx.Rngs(0),
        )

    graph, state = nnx.split(nnx.eval_shape(build))

    def run(state, x):
        def loss(state, x):
            return jnp.sum(nnx.merge(graph, state)(x).astype(jnp.float32) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(state, x)

    x = jax.ShapeDtypeStruct((1, length, 1024), jnp.bfloat16)
    text = compile_for("H200", run, state, x).as_text()
    assert text is not None
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:transpose|copy)\((%\S*)\)", text)
    sizes = [math.prod(map(int, shape.split(","))) for shape, of in moved if "broadcast" not in of]
    # keys and values are copied for the matmul of phi
    assert max(sizes) == length * kv_heads * width


def full_attention(tokens, heads, packed=True):
    """Compiles a dense attention layer, forward and backward, with default choices.

    Returns its scratch bytes and its text.
    """

    def build():
        return FullAttention(
            heads, 1024, num_kv_heads=8, head_dim=128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )

    graph, state = nnx.split(nnx.eval_shape(build))

    def run(state, x, ids):
        def loss(state, x):
            y = nnx.merge(graph, state)(x, ids if packed else None)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.value_and_grad(loss)(state, x)

    x = jax.ShapeDtypeStruct((1, tokens, 1024), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    # A merged pair of matmuls would need a GPU for autotuning, so do not merge any.
    apart = {"xla_gpu_dot_merger_threshold_mb": 0}
    compiled = compile_for("H200", run, state, x, ids, compiler_options=apart)
    found, text = compiled.memory_analysis(), compiled.as_text()
    assert found is not None
    assert text is not None
    return found.temp_size_in_bytes, text


@pytest.mark.parametrize("packed", [True, False])
def test_memory_of_full_attention_is_linear(packed):
    """Four times the tokens take at most 4.2 times the scratch, with the Hopper kernels."""
    scratch, text = full_attention(16384, 32, packed)
    assert full_attention(65536, 32, packed)[0] <= 4.2 * scratch
    for kernel in ("forward", "query_gradient", "key_gradient"):
        assert f"hopper_{kernel}_kernel" in text


def test_full_attention_at_five_heads_a_group_runs_on_hopper():
    """A group of five is split into 4 and 1, so each kernel is called twice."""
    text = full_attention(16384, 40)[1]
    for kernel in ("forward", "query_gradient", "key_gradient"):
        assert len(re.findall(rf"custom-call.*hopper_{kernel}_kernel", text)) == 2
    assert "range_forward_kernel" not in text
