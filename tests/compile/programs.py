"""Programs that several tests compile, and the names of kernels in what is compiled."""

import dataclasses

import jax
import jax.numpy as jnp

import fsa_jax
from fsa_jax.bench.ahead_of_time import compile_for
from fsa_jax.training.config import PRESETS
from fsa_jax.transformer import TransformerConfig

TRITON, MOSAIC = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"
#: One decoder layer with the sizes of Llama 3 8B, on one sequence of 131,072 tokens.
LLAMA_LAYER = dataclasses.replace(
    PRESETS["small"],
    batch_size=1,
    seq_len=131072,
    model=TransformerConfig(
        vocab_size=257,
        num_layers=1,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14336,
        remat=True,
        dtype="bfloat16",
    ),
)
#: Qwen3-8B with its vocabulary, and NSA as its attention.
QWEN3_8B = TransformerConfig(
    vocab_size=151_936,
    num_layers=36,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=12288,
    qk_norm=True,
    tie_embeddings=False,
    rope_theta=1e6,
    remat=True,
    dtype="bfloat16",
)


def compile_branch(group):
    """Compiles compressed attention with its gradients."""
    shapes = [(1, 8192, 2 * group, 128), *[(1, 512, 2, 128)] * 2]
    arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in shapes]

    def run(*arrays):
        def attend(*arrays):
            return fsa_jax.compressed_attention(
                *arrays, kernel_size=32, kernel_stride=16, implementation="mosaic_gpu"
            )

        out, pull = jax.vjp(attend, *arrays)
        return out, pull(out)

    return compile_for("H200", run, *arrays)
