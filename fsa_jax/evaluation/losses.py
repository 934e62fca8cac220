"""The loss of a model by position in the document, with standard errors.

The position of a prediction is that of the last token that the model has read, counted from 0 at
the start of the document, or of the part of it that a sequence holds: at position p the model has
read p + 1 tokens of the document. Bucket 0 is position 0, and bucket b > 0 the positions 2^(b-1) to
2^b - 1.

Shapes: N sequences, B of them at a time, T tokens, C width, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fsa_jax.evaluation.text import Sequences
from fsa_jax.losses import cross_entropy
from fsa_jax.transformer import Transformer


def bucket_of(positions: np.ndarray) -> np.ndarray:
    """The bucket of each position: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, ..."""
    # frexp is exact, which a floating-point logarithm need not be.
    return np.frexp(positions.astype(np.float64))[1]


def bucket_range(bucket: int) -> tuple[int, int]:
    """The first position of a bucket, and one past its last."""
    return (2 ** (bucket - 1) if bucket else 0), 2**bucket


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk_size"))
def _token_losses(
    graphdef: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    chunk_size: int,
) -> Float[Array, "B T"]:
    model = nnx.merge(graphdef, params)
    hidden = model.hidden_states(tokens, segment_ids)
    return cross_entropy(hidden, model.head_weight, targets, counted, chunk_size=chunk_size)


def token_losses(
    model: Transformer, sequences: Sequences, *, batch_size: int, chunk_size: int
) -> np.ndarray:
    """The loss of every prediction.

    Args:
      model: the model.
      sequences: the sequences.
      batch_size: sequences in one call of the model (B).
      chunk_size: tokens whose logits, `chunk_size` times V float32 numbers, exist at a time.

    Returns:
      float64 [N, T] in nats; 0 where nothing is predicted.

    Raises:
      FloatingPointError: a loss is not finite.
    """
    graphdef, params = nnx.split(model)
    # In a sequence the trainer's 0 is padding, whatever id the model takes for it.
    padding_id = model.config.padding_id
    ids = np.where(sequences.segment_ids > 0, sequences.segment_ids, padding_id)
    if padding_id > 0:  # documents are numbered from 1, so that one may have this number
        ids = np.where(sequences.segment_ids >= padding_id, sequences.segment_ids + 1, ids)
    counted = sequences.counted
    targets = sequences.targets
    batch_size = min(batch_size, len(ids))
    losses = np.zeros(ids.shape, np.float64)
    for first in range(0, len(ids), batch_size):
        chosen = np.arange(first, first + batch_size) % len(ids)
        found = _token_losses(
            graphdef,
            params,
            sequences.tokens[chosen],
            ids[chosen].astype(np.int32),
            targets[chosen],
            counted[chosen],
            chunk_size,
        )
        losses[chosen] = np.asarray(found, np.float64)
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"loss must be finite, got {losses[~np.isfinite(losses)][0]}")
    return losses


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean, and its standard error, which is None where it cannot be estimated."""

    mean: float
    standard_error: float | None


def ratio_of_sums(sums: np.ndarray, counts: np.ndarray) -> Mean:
    """The mean over all tokens, and its standard error with sequences as the units.

    The tokens of one text are not independent of one another, so that the standard deviation of
    single tokens would promise too much. The error is that of a ratio of two sums over sequences.

    Args:
      sums: float64 [N], the sum over the tokens of each sequence.
      counts: [N], their number.

    References:
      Cochran, Sampling Techniques (1977), section 6.4.
    """
    used = counts > 0
    sums, counts = sums[used], counts[used]
    total = counts.sum()
    mean = float(sums.sum() / total)
    units = len(sums)
    if units < 2:
        return Mean(mean, None)
    squares = np.square(sums - mean * counts).sum() * units / (units - 1)
    return Mean(mean, float(math.sqrt(squares) / total))


def losses_by_bucket(
    losses: list[np.ndarray], sequences: Sequences, num_bytes: np.ndarray
) -> list[dict[str, Any]]:
    """The mean loss of each model in each bucket, and its difference from the first model.

    Args:
      losses: for each model, the result of `token_losses`.
      sequences: the sequences.
      num_bytes: [V], the bytes of text that each token stands for.

    Returns:
      A JSON value for each bucket that has predictions, and a last one for all positions together:
      "from" and "to", the positions; "tokens", the number of predicted tokens, and "bytes", that of
      the text they stand for; "models", for each model "loss", "standard_error", "bits_per_byte"
      (None without text) and, from the second model on, "difference" and its standard error.
    """
    counted = sequences.counted
    buckets = np.where(counted, bucket_of(sequences.positions), -1)
    found = [(*bucket_range(int(b)), buckets == b) for b in np.unique(buckets[counted])]
    found.append((0, int(sequences.positions[counted].max()) + 1, counted))
    rows = []
    for begin, end, chosen in found:
        size = int(num_bytes[sequences.targets[chosen]].sum())
        models = [_of_model(mine, losses[0], chosen, size) for mine in losses]
        row = {"from": begin, "to": end, "tokens": int(chosen.sum()), "bytes": size}
        rows.append(row | {"models": models})
    return rows


def _of_model(
    losses: np.ndarray, first: np.ndarray, chosen: np.ndarray, num_bytes: int
) -> dict[str, Any]:
    counts = chosen.sum(axis=1)
    loss = ratio_of_sums((losses * chosen).sum(axis=1), counts)
    bits = loss.mean * int(counts.sum()) / math.log(2)
    values: dict[str, Any] = {
        "loss": loss.mean,
        "standard_error": loss.standard_error,
        "bits_per_byte": bits / num_bytes if num_bytes else None,
    }
    if losses is not first:
        # The errors of both models on a text go together: that of the difference is smaller.
        difference = ratio_of_sums(((losses - first) * chosen).sum(axis=1), counts)
        values["difference"] = difference.mean
        values["difference_standard_error"] = difference.standard_error
    return values
