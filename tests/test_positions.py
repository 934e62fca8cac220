"""Positions in packed sequences, checked by counting, and through RoPE against single documents."""

import itertools
import re
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from util import assert_close, segmentations

import fsa_jax
from fsa_jax import RoPE, token_positions, window_positions

README = Path(__file__).parent.parent / "README.md"


def documents(row):
    """Returns (id, tokens) of each run of equal ids in a sequence."""
    return [(i, len(list(run))) for i, run in itertools.groupby(row)]


def counted(row, kernel_size, kernel_stride):
    """Computes the positions of tokens, and of the windows of `compress`, by counting."""
    tokens = [t for _, n in documents(row) for t in range(n)]
    windows = [
        start
        for i, n in documents(row)
        if i > 0
        for start in range(0, n - kernel_size + 1, kernel_stride)
    ]
    slots = len(row) // kernel_stride
    return tokens, windows + [0] * (slots - len(windows))


@pytest.mark.slow
@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(st.data())
def test_positions_are_those_that_counting_finds(data):
    length = data.draw(st.sampled_from([3, 25]))  # includes a length shorter than a stride
    ids = data.draw(segmentations(2, length))
    tokens, windows = zip(*(counted(row.tolist(), 8, 4) for row in ids), strict=True)
    np.testing.assert_array_equal(token_positions(ids), tokens)
    found = window_positions(ids, kernel_size=8, kernel_stride=4)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, windows)
    one = window_positions(ids[0].tolist(), kernel_size=8, kernel_stride=4)
    np.testing.assert_array_equal(one, windows[0])


def test_without_documents():
    sizes: dict[str, Any] = {"kernel_size": 8, "kernel_stride": 4}
    np.testing.assert_array_equal(window_positions(None, **sizes, length=19), [0, 4, 8, 0])
    given = np.arange(19)[None] + 5
    np.testing.assert_array_equal(window_positions(None, **sizes, positions=given), [[5, 9, 13, 0]])
    np.testing.assert_array_equal(
        window_positions([1] * 9 + [2] * 10, **sizes, positions=given[0]), [5, 14, 0, 0]
    )


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_over_the_devices_of_a_sequence_axis(axis_type):
    """In zigzag order, each chunk stores its windows first; this includes Explicit mesh axes."""
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(axis_type,))
    ids = np.repeat([[1, 2, 3, 0]], [13, 25, 20, 6], axis=1).astype(np.int32)
    sizes: dict[str, Any] = {"kernel_size": 8, "kernel_stride": 4}
    with jax.set_mesh(mesh):
        where = jax.NamedSharding(mesh, jax.P(None, "sequence"))
        ordered = jax.device_put(fsa_jax.to_zigzag(jnp.asarray(ids), 4), where)
        at = jax.jit(lambda x: token_positions(x, sequence_axis="sequence"))(ordered)
        first = jax.jit(lambda x: window_positions(x, **sizes, sequence_axis="sequence"))(ordered)
    plain = counted(ids[0].tolist(), 8, 4)[0]
    np.testing.assert_array_equal(fsa_jax.from_zigzag(jnp.asarray(np.asarray(at)), 4)[0], plain)
    starts = np.flatnonzero(
        [
            (i > 0) & (t % 4 == 0) & (k >= 8)
            for i, t, k in zip(ids[0], plain, left(ids[0]), strict=True)
        ]
    )
    wanted = np.zeros(16, int)
    for chunk in range(8):  # each chunk has 8 tokens and 2 window slots
        own = [plain[s] for s in starts if s // 8 == chunk]
        wanted[2 * chunk : 2 * chunk + len(own)] = own
    first = fsa_jax.from_zigzag(jnp.asarray(np.asarray(first)), 4)[0]
    np.testing.assert_array_equal(first, wanted)


def left(row):
    """Returns, for each token, the number of tokens to the end of its document, itself included."""
    return [n - t for _, n in documents(row.tolist()) for t in range(n)]


def test_the_example_of_the_readme_is_its_documents_one_by_one():
    """With RoPE, the documents of a packed sequence do not affect one another."""
    block = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)[0]
    assert "window_positions" in block
    # Run the same text on shorter documents.
    for long, short in (("4096", "256"), ("1500", "90"), ("2500", "150"), ("[0] * 96", "[0] * 16")):
        block = block.replace(long, short)
    out, alone, windows = jax.jit(lambda: as_packed_and_alone(block, [(0, 90), (90, 240)]))()
    assert out.shape == (1, 256, 8, 64)
    assert_close(out[:, :240], jnp.concatenate(alone, axis=1), 1e-5)
    np.testing.assert_array_equal(out[:, 240:], 0)
    assert (windows[0] != 16 * np.arange(16))[:11].any()  # differs from the naive positions


def as_packed_and_alone(block, spans):
    """Returns what the example computes and its documents one by one, as one program under jit."""
    exec(block, names := {})
    alone, rotate = [], names["rotate"]
    for start, stop in spans:
        query, key, value, gates = (
            names[name][:, start:stop] for name in ("query", "key", "value", "gates")
        )
        position = jnp.arange(stop - start)
        ck, cv = (
            fsa_jax.compress(x, kernel_size=32, kernel_stride=16, method="mean")
            for x in (key, value)
        )
        one = fsa_jax.native_sparse_attention(
            rotate(query, position),
            rotate(key, position),
            value,
            rotate(ck, 16 * jnp.arange(ck.shape[1])),
            cv,
            gates,
            config=names["config"],
            implementation="reference",
        )
        alone.append(one)
    return names["out"], alone, names["window_starts"]


def test_rope_takes_positions_that_rows_share():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    got = RoPE().apply(x, [0, 3, 1, 1, 7])
    want = RoPE().apply(x, jnp.asarray([[0, 3, 1, 1, 7]] * 2))
    np.testing.assert_array_equal(got, want)


BAD = [
    ({"segment_ids": None}, r"length \(or segment_ids, or positions\) must be an integer .* None"),
    ({"segment_ids": None, "length": 0}, "length .* at least 1, got 0"),
    ({"length": 3}, "length must not be given where segment_ids .* got 3"),
    ({"segment_ids": np.ones((1, 2, 3), int)}, r"segment_ids must have shape \[B T\]"),
    ({"segment_ids": [[1, 2], [1]]}, "segment_ids must be an integer array .*lists.* got"),
    ({"segment_ids": [1.0, 2.0]}, "segment_ids must have an integer dtype .* got float64"),
    ({"segment_ids": []}, r"segment_ids must have no empty axis, got shape \(0,\)"),
    ({"segment_ids": [1, -1]}, r"segment_ids must be 0 \(padding\) or positive, got -1"),
    ({"positions": [1, 2]}, r"positions must have the leading axes .*\(1, 2\) and \(1, 3\)"),
    ({"kernel_stride": 3}, "kernel_size must be a positive multiple of kernel_stride"),
    ({"kernel_size": 4.0}, "kernel_size must be an integer .* got 4.0"),
    ({"sequence_axis": "x"}, "arrays must have a batch axis with sequence_axis='x'"),
    ({"sequence_axis": 3}, "sequence_axis must be None or the name of a mesh axis, got 3"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_bad_input(changed, message):
    arguments: dict[str, Any] = {"segment_ids": [1, 1, 2], "kernel_size": 4, "kernel_stride": 2}
    with pytest.raises(ValueError, match=message):
        window_positions(**arguments | changed)
    if set(changed) == {"segment_ids"} and changed["segment_ids"] is not None:
        with pytest.raises(ValueError, match=message):
            token_positions(**changed)
