"""Calls with a cache, compiled for a GPU: kernels, memory, and no copy of the whole page pool."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fsa_jax.bench.ahead_of_time import compile_for
from fsa_jax.transformer import Transformer, TransformerConfig

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("empty_kernels")]
MIB = 2**20
LENGTH = 131072
#: Two decoder layers with the sizes of Llama 3 8B.
CONFIG = TransformerConfig(
    num_layers=2,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
    dtype="bfloat16",
    param_dtype="bfloat16",
)


def compiled(length, batch=1, **options):
    """Compiles a call with `length` tokens for an H200; returns scratch and cache bytes, text."""
    model = nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    cache = jax.eval_shape(lambda: model.init_cache(batch, LENGTH))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def call(params, tokens, cache):
        return nnx.merge(graphdef, params)(tokens, cache=cache, only_last=True, **options)

    found = compile_for("H200", jax.jit(call, donate_argnums=2), params, tokens, cache)
    memory, text = found.memory_analysis(), found.as_text()
    assert memory is not None
    assert text is not None
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= 0.99 * size  # the new cache reuses the old one's memory
    # Pages never change layout, which would copy all of them.
    assert "[4096,64,8,128]{3,2,1,0" in text
    assert not re.search(r"\[4096,(64|4),8,128\]\{(?!3,2,1,0)", text)
    return memory.temp_size_in_bytes, size, text


@pytest.mark.essential
def test_a_step_takes_little_memory():
    scratch, size, text = compiled(1)
    print(f"{scratch / MIB:.0f} MiB of {size / MIB:.0f}")
    # The scratch holds one layer's compressed keys and values, the blocks of one query, and mostly
    # weights in another layout.
    assert scratch < 200 * MIB < size / 5
    assert "merge_splits_kernel" in text
    assert not re.search(r"(range|hopper)_forward_kernel", text)


def test_a_first_prompt_runs_the_kernels_of_training():
    scratch, _, text = compiled(LENGTH, fresh=True)
    print(f"{scratch / MIB:.0f} MiB")
    assert scratch < 12288 * MIB
    for kernel in ("hopper_forward", "compressed_fold", "compressed_choose"):
        assert f"{kernel}_kernel" in text


def test_a_chunk_runs_them_on_rows_of_keys():
    scratch, size, text = compiled(2048)
    print(f"{scratch / MIB:.0f} MiB of {size / MIB:.0f}")
    assert scratch < 2048 * MIB
    for kernel in ("hopper_forward", "score", "choose"):
        assert f"{kernel}_kernel" in text
