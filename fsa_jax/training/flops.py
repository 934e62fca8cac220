"""The model flops utilisation of a run: what part of the device's peak its matmuls need."""

from typing import Any

import jax

from fsa_jax.transformer import TransformerConfig

#: Floating-point operations a second of dense products of 16-bit matrices, by the beginning of the
#: device's name, as NVIDIA's data sheets state them.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def flops_per_token(params: Any, config: TransformerConfig) -> float:
    """Six for each parameter of a matrix that a token is multiplied with, forward and backward.

    The products of attention are not counted, nor what the backward pass computes again, as is
    usual for a utilisation that is compared between models. An embedding table counts if it is the
    output head too.

    Args:
      params: nested dict of parameters.
      config: the model.
    """
    found = jax.tree_util.tree_leaves_with_path(params)
    vectors = ("scale", "bias")
    count = sum(leaf.size for path, leaf in found if str(path[-1].key) not in vectors)
    if not config.tie_embeddings:
        count -= config.vocab_size * config.embed_dim
    return 6.0 * count


def peak_flops(device: Any, dtype: str) -> float | None:
    """The peak of a ``jax.Device`` for products of a dtype; None where it is not known."""
    if dtype not in ("bfloat16", "float16"):
        return None
    kind = device.device_kind
    names = sorted((name for name in PEAKS if kind.startswith(name)), key=len)
    return PEAKS[names[-1]] if names else None
