"""The loss by position, against loops that are written out."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx
from small_transformers import CONFIG, FULL

from evaluation.fakes import text_of, text_without_start
from fsa_jax.evaluation.losses import bucket_of, bucket_range, losses_by_bucket, token_losses
from fsa_jax.evaluation.text import Sequences, pack
from fsa_jax.training.data import validation_batches
from fsa_jax.transformer import Transformer

RNG = np.random.default_rng(0)
IDS = np.repeat([[1, 2, 3, 3], [1, 1, 2, 0], [4, 4, 4, 4]], 6, axis=1).astype(np.int32)
ONE = np.ones(11, np.int64)
SEQUENCES = Sequences(RNG.integers(0, 11, IDS.shape).astype(np.int32), IDS)


def test_buckets_are_powers_of_two():
    positions = np.asarray([0, 1, 2, 3, 4, 7, 8, 2**20 - 1, 2**20])
    assert bucket_of(positions).tolist() == [0, 1, 2, 2, 3, 3, 4, 20, 21]
    for position, bucket in zip(positions, bucket_of(positions), strict=True):
        first, end = bucket_range(int(bucket))
        assert first <= position < end
    assert [bucket_range(b) for b in range(4)] == [(0, 1), (1, 2), (2, 4), (4, 8)]


@pytest.mark.fast_cases("full-2")
@pytest.mark.parametrize("padding_id", [0, -1, 2])
@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["nsa", "full"])
def test_losses_of_tokens_are_those_of_each_document_alone(config, padding_id):
    model = Transformer(dataclasses.replace(config, padding_id=padding_id), rngs=nnx.Rngs(0))
    ids = np.repeat([[1, 2], [1, 0], [7, 9]], 8, axis=1).astype(np.int32)
    tokens = RNG.integers(0, 11, ids.shape).astype(np.int32)
    found = token_losses(model, Sequences(tokens, ids), batch_size=2, chunk_size=7)
    documents = tokens.reshape(6, 8)
    log_p = np.asarray(jax.nn.log_softmax(model(documents)), np.float64)
    wanted = np.zeros((6, 8))
    for number, document in enumerate(documents):
        for i in range(7) if number != 3 else ():  # the padding
            wanted[number, i] = -log_p[number, i, document[i + 1]]
    np.testing.assert_allclose(found, wanted.reshape(3, 16), atol=2e-6)


def test_means_and_errors_of_buckets():
    counted = SEQUENCES.counted
    losses = [np.where(counted, RNG.random(IDS.shape), 0.0) for _ in range(2)]
    num_bytes = RNG.integers(0, 5, 11)
    rows = losses_by_bucket(losses, SEQUENCES, num_bytes)
    assert [(row["from"], row["to"]) for row in rows] == [
        *((0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32)),
        (0, 23),
    ]
    for row in rows:
        text = 0
        units = []  # of each sequence: number of tokens, loss of the first model, of the second
        for b, ids in enumerate(IDS):
            start, total = 0, np.zeros(3)
            for t in range(len(ids) - 1):
                if t and ids[t] != ids[t - 1]:
                    start = t
                if ids[t] and ids[t] == ids[t + 1] and row["from"] <= t - start < row["to"]:
                    total += [1, losses[0][b, t], losses[1][b, t]]
                    text += num_bytes[SEQUENCES.tokens[b, t + 1]]
            units.append(total)
        counts, first, second = np.transpose(units)
        assert (row["tokens"], row["bytes"]) == (counts.sum(), text)
        mine, other = row["models"]
        bits = first.sum() / math.log(2)
        assert mine["bits_per_byte"] == (pytest.approx(bits / text) if text else None)
        for sums, mean, error in (
            (first, mine["loss"], mine["standard_error"]),
            (second, other["loss"], other["standard_error"]),
            (second - first, other["difference"], other["difference_standard_error"]),
        ):
            used = counts > 0
            n = used.sum()
            assert mean == pytest.approx(sums.sum() / counts.sum())
            if n < 2:
                assert error is None
                continue
            # The variance of a ratio of two means over n sequences, to first order.
            rest = sums[used] - mean * counts[used]
            variance = np.sum(rest**2) / (n - 1) / n / counts[used].mean() ** 2
            assert error == pytest.approx(math.sqrt(variance))
        assert "difference" not in mine


def test_standard_errors_say_how_far_means_of_new_texts_spread():
    def draw() -> np.ndarray:
        # Tokens of one sequence share most of their deviation.
        shared = RNG.normal(size=(40, 1))
        return np.where(sequences.counted, 5 + shared + 0.5 * RNG.normal(size=shape), 0.0)

    shape = (40, 16)
    sequences = Sequences(np.zeros(shape, np.int32), np.ones(shape, np.int32))
    rows = [losses_by_bucket([draw()], sequences, ONE)[-1]["models"][0] for _ in range(300)]
    spread = np.std([row["loss"] for row in rows])
    assert np.mean([row["standard_error"] for row in rows]) == pytest.approx(spread, rel=0.15)


def test_losses_that_are_not_finite():
    model = Transformer(FULL, rngs=nnx.Rngs(0))
    scale = model.norm.scale
    assert scale is not None
    scale[...] = scale[...] * np.float32(np.nan)
    with pytest.raises(FloatingPointError, match="loss must be finite, got nan"):
        token_losses(model, SEQUENCES, batch_size=2, chunk_size=64)


@pytest.mark.parametrize("limit", [3, 100])
def test_the_sequences_are_those_of_the_validation_of_the_trainer(limit):
    documents = [bytes(RNG.integers(0, 256, n).astype(np.uint8)) for n in (50, 3, 1, 90, 20)]
    found = pack(text_of(*documents), seq_len=16, limit=limit)
    batches = validation_batches(documents, seq_len=16, batch_size=1, num_sequences=limit)
    np.testing.assert_array_equal(found.tokens, np.concatenate([b.tokens for b in batches]))
    np.testing.assert_array_equal(
        found.segment_ids, np.concatenate([b.segment_ids for b in batches])
    )


def test_a_text_without_start_tokens():
    found = pack(text_without_start(b"abc", b"d"), seq_len=4, limit=1)
    assert (found.tokens.tolist(), found.segment_ids.tolist()) == (
        [list(b"abcd")],
        [[1, 1, 1, 2]],
    )
    assert found.positions.tolist() == [[0, 1, 2, 0]]
    assert found.counted.tolist() == [[True, True, False, False]]


def test_a_text_shorter_than_a_sequence():
    with pytest.raises(ValueError, match=r"seq_len must be at most the 6 tokens .* got seq_len=7"):
        pack(text_of(b"abc", b"d"), seq_len=7, limit=1)


def test_rows_without_text_have_no_bits_per_byte():
    losses = [np.where(SEQUENCES.counted, 1.0, 0.0)]
    rows = losses_by_bucket(losses, SEQUENCES, 0 * ONE)
    assert {row["models"][0]["bits_per_byte"] for row in rows} == {None}
