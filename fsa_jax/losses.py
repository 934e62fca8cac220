"""The loss of a language model, without an array of tokens times vocabulary.

Shapes: N tokens of a device, n tokens of a chunk, C features, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Integer

from fsa_jax.arguments import checks
from fsa_jax.arguments.types import AnyArray
from fsa_jax.ops import partition
from fsa_jax.semantics.precision import accumulation_dtype, einsum, narrow

#: Tokens of a chunk. Each chunk of the backward pass reads and writes the gradient of the head,
#: [V, C] in float32, once. At 2048 tokens that takes about a tenth of the time of the chunk's
#: matmuls on an H200, and the logits of 152,000 entries take 1.2 GiB.
CHUNK_SIZE = 2048


@narrow
def cross_entropy(
    x: Float[AnyArray, "*B C"],
    head: Float[AnyArray, "V C"],
    labels: Integer[AnyArray, "*B"],
    weights: Float[AnyArray, "*B"] | Bool[AnyArray, "*B"] | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
    mesh: Mesh | AbstractMesh | None = None,
    spec: PartitionSpec | None = None,
) -> Float[Array, "*B"]:
    """Cross-entropy of each token under logits that are computed a few tokens at a time.

    With z_t = head x_t, the result is weights_t (log sum_v exp(z_tv) - z_t,labels_t), with the
    natural logarithm.

    The tokens are taken in chunks of at most `chunk_size`, one after another. The forward pass
    keeps the logarithm of the sum for each token, and the backward pass computes the logits again.
    So neither pass holds more than the logits of one chunk, [chunk_size, V] in float32, and in the
    backward pass their gradient in the dtype of `x`; the gradient of the head is summed in float32,
    [V, C]. This takes one more product with the head than to keep all logits. The logits and sums
    are float32 (float64 for a float64 `x`), and the head is rounded to the dtype of `x`; gradients
    of logits are rounded to bfloat16 where `x` is bfloat16. Each run gives the same bits.

    Args:
      x: hidden states after the final normalisation, [..., C]; any value where the weight is 0.
      head: the matrix of the output head, [V, C]; the embedding table if they are tied.
      labels: integers [...] in 0 .. V - 1, any value where the weight is 0.
      weights: [...], the weight of each token, or whether it counts; None: all count once. They
        are constants of differentiation.
      chunk_size: the most tokens of a chunk, on each device.
      mesh: mesh over whose axes the tokens are split; None: that of `x` if its axes are Explicit,
        and otherwise XLA decides what to do with arrays that are split. On a mesh, every device
        takes its own tokens and the whole head, and the gradient of the head is summed over the
        devices once.
      spec: with `mesh`, the mesh axes of each axis of `labels`. An axis of the mesh that it leaves
        out does the same work on all its devices.

    Returns:
      float32 [...], 0 where the weight is 0.

    Raises:
      ValueError: a shape or dtype does not match; `spec` does not fit; outside jit, a label that
        counts is not in the vocabulary. Inside jit the loss of such a label is NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> x, head = jnp.ones((2, 3, 8)), jnp.zeros((16, 8))
      >>> losses = cross_entropy(x, head, jnp.zeros((2, 3), jnp.int32), chunk_size=4)
      >>> losses.shape, round(float(losses[0, 0]), 4)  # log 16
      ((2, 3), 2.7726)

    References:
      Cut Your Losses in Large-Vocabulary Language Models, arXiv 2411.09009, computes the same
      function in tiles.
    """
    x, head, labels, weights = _checked(x, head, labels, weights)
    chunk_size = checks.size("chunk_size", chunk_size)
    counted = weights if weights.dtype == bool else weights != 0
    labels = checks.tokens("labels", labels, head.shape[0], counted)
    place = _place(x, labels.shape, mesh, spec)
    if place is None:
        mesh, spec = None, PartitionSpec()
    else:
        mesh, spec = place
        arrays = ((x, spec), (head, PartitionSpec()), (labels, spec), (counted, spec))
        x, head, labels, counted = (_placed(y, mesh, spec) for y, spec in arrays)
    losses: Any = _losses(chunk_size, mesh, spec, x, head, labels, counted)
    return losses * jax.lax.stop_gradient(weights).astype(losses.dtype)


def _checked(x, head, labels, weights):
    """The arguments as arrays, after checks of their shapes and dtypes."""
    head = checks.floating("head", head, "V C")
    if not isinstance(x, jax.Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
        got = getattr(x, "dtype", None) or checks.short(x)
        raise ValueError(f"x must be an array of floats of shape [..., C], got {got}")
    if not x.ndim or x.shape[-1] != head.shape[1]:
        raise ValueError(
            "x must have the features C of the head [V, C], got x of shape "
            f"{list(x.shape)} and head of shape {list(head.shape)}"
        )
    weights = np.ones(x.shape[:-1], bool) if weights is None else weights
    for name, value in (("labels", labels), ("weights", weights)):
        if not isinstance(value, jax.Array | np.ndarray) or value.shape != x.shape[:-1]:
            got = getattr(value, "shape", None)
            raise ValueError(
                f"{name} must be an array of shape {list(x.shape[:-1])}, as x has tokens, got "
                f"{checks.short(value) if got is None else list(got)}"
            )
    labels = checks.integers("labels", labels, "B " * labels.ndim, empty="B", saturate=True)
    if weights.dtype != bool and not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"weights must be floats or bools, got {weights.dtype}")
    return jnp.asarray(x), head, labels, jnp.asarray(weights)


def _placed(x: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    """The array split by `spec`, where the axes of the mesh are Explicit."""
    return jax.sharding.reshard(x, NamedSharding(mesh, spec)) if mesh.explicit_axes else x


def _place(x, shape, mesh, spec) -> tuple[Any, PartitionSpec] | None:
    """The mesh that the tokens are split over, and how, after a check that they fit."""
    if mesh is None:
        if spec is not None:
            raise ValueError(f"spec must come with a mesh, got {spec} and mesh=None")
        mesh = partition.explicit_mesh(x)
        if mesh is None:
            return None
        spec = PartitionSpec(*tuple(partition.explicit_spec(x))[: len(shape)])
    spec = PartitionSpec() if spec is None else spec
    if len(spec) > len(shape):
        raise ValueError(f"spec must have at most the {len(shape)} axes of labels, got {spec}")
    for i, axes in enumerate(spec):
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        unknown = [name for name in names if name not in mesh.shape]
        devices = math.prod(mesh.shape[name] for name in names if name in mesh.shape)
        if unknown or shape[i] % devices:
            raise ValueError(
                f"spec must name axes of the mesh {dict(mesh.shape)} that divide the labels' shape "
                f"{list(shape)}, got {spec}"
            )
    return mesh, spec


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that occur in `spec`."""
    return tuple(
        name for axes in spec if axes for name in (axes if isinstance(axes, tuple) else (axes,))
    )


def _on_each_device(function: Callable, mesh: Any, spec: PartitionSpec, tokens: int, outs):
    """`function` of the tokens of each device and of the whole head.

    Args:
      function: takes `tokens` arrays [..., *], and then the head.
      mesh: the mesh; None: `function` itself.
      spec: how the tokens are split.
      tokens: the number of arrays that are split.
      outs: for each result, whether it is split like the tokens.
    """
    if mesh is None:
        return function
    specs = (spec,) * tokens
    out_specs = tuple(spec if split else PartitionSpec() for split in outs)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(*specs, PartitionSpec()),
        out_specs=out_specs if len(outs) > 1 else out_specs[0],
        check_vma=False,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _losses(chunk_size, mesh, spec, x, head, labels, counted):
    return _losses_fwd(chunk_size, mesh, spec, x, head, labels, counted)[0]


def _losses_fwd(chunk_size, mesh, spec, x, head, labels, counted):
    def forward(x, labels, counted, head):
        def step(_, arrays):
            x, labels, counted = arrays
            logits = _logits(x, head, counted)
            logsumexp = jax.nn.logsumexp(logits, axis=-1)
            # NaN for a label that is not in the vocabulary
            found = jnp.take_along_axis(
                logits, labels[:, None], axis=-1, mode="fill", fill_value=jnp.nan
            )[:, 0]
            return (), (jnp.where(counted, logsumexp - found, 0), logsumexp)

        _, found = _scan(chunk_size, step, (), _rows(x, labels, counted))
        return tuple(y.reshape(labels.shape) for y in found)

    run = _on_each_device(forward, mesh, spec, 3, (True, True))
    losses, logsumexp = run(x, labels, counted, head.astype(x.dtype))
    return losses, (x, head, labels, counted, logsumexp)


def _losses_bwd(chunk_size, mesh, spec, residuals, dlosses):
    x, head, labels, counted, logsumexp = residuals
    # float16 has too small a range for gradients of a mean over many tokens
    narrow_dtype = jnp.float32 if x.dtype == jnp.float16 else x.dtype

    def backward(x, labels, counted, logsumexp, dlosses, head):
        small = head.astype(narrow_dtype)

        def step(dhead, arrays):
            x, labels, counted, logsumexp, dlosses = arrays
            probabilities = jnp.exp(_logits(x, head, counted) - logsumexp[:, None])
            entries = jax.lax.broadcasted_iota(labels.dtype, probabilities.shape, 1)
            right = (labels[:, None] == entries).astype(probabilities.dtype)
            dlogits = ((probabilities - right) * dlosses[:, None]).astype(narrow_dtype)
            dlogits = _kept(dlogits, counted)
            x = _kept(x, counted).astype(narrow_dtype)
            dx = einsum("nv,vc->nc", dlogits, small)
            return dhead + einsum("nv,nc->vc", dlogits, x), dx

        wide = accumulation_dtype(x)
        dhead, dx = _scan(
            chunk_size,
            step,
            jnp.zeros(head.shape, wide),
            _rows(x, labels, counted, logsumexp, dlosses),
            dtype=x.dtype,
        )
        if mesh is not None and _axes(spec):
            dhead = jax.lax.psum(dhead, _axes(spec))
        return dx.reshape(x.shape), dhead

    run = _on_each_device(backward, mesh, spec, 5, (True, False))
    dx, dhead = run(x, labels, counted, logsumexp, dlosses, head.astype(x.dtype))
    return dx, dhead.astype(head.dtype), None, None


_losses.defvjp(_losses_fwd, _losses_bwd)


def _logits(x: Float[Array, "n C"], head: Float[Array, "V C"], counted: Bool[Array, " n"]):
    """The logits of a chunk, [n, V] in the accumulation dtype; those of zeros if not counted."""
    return einsum("nc,vc->nv", _kept(x, counted), head)


def _kept(x: Float[Array, "n *D"], counted: Bool[Array, " n"]):
    """The array with 0 for tokens that do not count, whose values and cotangents may be NaN."""
    return jnp.where(counted[:, None], x, 0)


def _rows(x, *others):
    """Arrays [N, ...] of the tokens of a device."""
    count = math.prod(x.shape[:-1])
    return (x.reshape(count, x.shape[-1]), *(y.reshape(count) for y in others))


def _scan(chunk_size: int, step: Callable, carry: Any, arrays: tuple, dtype: Any = None):
    """Runs `step(carry, chunk) -> (carry, results)` over chunks of the tokens, in order.

    Args:
      chunk_size: the most tokens of a chunk.
      step: takes the arrays of a chunk.
      carry: its first carry.
      arrays: arrays [N, ...]; tokens that are added to fill the last chunk are 0, so not counted.
      dtype: dtype of the results; None: as `step` returns them.
    """
    tokens = arrays[0].shape[0]
    if not tokens:
        return step(carry, arrays)
    chunks = -(-tokens // chunk_size)
    size = -(-tokens // chunks)
    filled = chunks * size - tokens

    def split(x):
        x = jnp.pad(x, ((0, filled), *((0, 0),) * (x.ndim - 1))) if filled else x
        return x.reshape(chunks, size, *x.shape[1:])

    def cast(carry, chunk):
        carry, results = step(carry, chunk)
        return carry, jax.tree.map(lambda y: y.astype(dtype or y.dtype), results)

    if chunks == 1:
        return cast(carry, arrays)
    carry, results = jax.lax.scan(cast, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:tokens], results)
