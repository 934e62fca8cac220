"""The segment tables of packed sequences, against plain loops over the documents."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from loop_oracle import documents, windows_seen
from util import lists, segmentations

from fsa_jax.semantics import segments

LENGTH = 40


@jax.jit
def tables(ids, indices):
    segment_info = segments.describe_segments(ids, *ids.shape)
    windows = segments.describe_windows(segment_info, 6, 3)
    starts = segments.listed_block_starts(segment_info, indices, 6)
    return {
        **{name: getattr(segment_info, name) for name in ("valid", "start", "end", "position")},
        "window_start": windows.start,
        "first": windows.first,
        "visible": windows.visible,
        "range": segments.visible_tokens(segment_info, 5),
        "seen_windows": segments.visible_windows(windows),
        "query_range_of_windows": segments.query_range_of_windows(segment_info, windows, 6),
        "query_range_of_tokens": segments.query_range_of_tokens(segment_info, 5),
        "block_start": starts,
    }


@settings(deadline=None, max_examples=150)
@given(segmentations(2, LENGTH))
def test_tables_of_any_segmentation(ids):
    indices = lists(0, 2, LENGTH, 1, 5, LENGTH // 6)
    table = jax.tree.map(np.asarray, tables(ids, indices))
    low, high = table["range"]
    for seen, query_range in (
        ("range", "query_range_of_tokens"),
        ("seen_windows", "query_range_of_windows"),
    ):
        sees, seen_by = (
            np.stack([(at >= a) & (at < b) for at in range(LENGTH)])
            for a, b in (table[seen], table[query_range])
        )  # the shapes are [key, B, query] and [query, B, key]
        keys = seen_by.shape[2]
        np.testing.assert_array_equal(sees[:keys].transpose(2, 1, 0), seen_by)
        assert not sees[keys:].any()
    for b, row in enumerate(ids):
        np.testing.assert_array_equal(table["valid"][b], row > 0)
        slots = []
        for start, end in documents(row):
            number = np.arange(end - start)
            np.testing.assert_array_equal(table["start"][b, start:end], start)
            np.testing.assert_array_equal(table["end"][b, start:end], end)
            np.testing.assert_array_equal(table["position"][b, start:end], number)
            first = len(slots)
            slots += range(start, end - 5, 3)
            for t in number:
                seen = len(windows_seen(t, end - start, 6, 3))
                assert table["visible"][b, start + t] == seen
                assert not seen or table["first"][b, start + t] == first
                assert (low[b, start + t], high[b, start + t]) == (
                    start + max(0, t - 4),
                    start + t + 1,
                )
                wanted, met = [], set()
                for j in np.asarray(indices)[b, start + t, 0].tolist():
                    counts = 0 <= j <= t // 6 and j not in met
                    wanted.append(start + j * 6 if counts else LENGTH)
                    met.add(j)
                assert table["block_start"][b, start + t, 0].tolist() == wanted
        assert table["window_start"][b].tolist() == slots + [LENGTH] * (LENGTH // 3 - len(slots))
        padding = row <= 0
        assert (high[b] <= low[b])[padding].all()
        assert not table["visible"][b][padding].any()
        assert (table["block_start"][b][padding] == LENGTH).all()


def test_a_row_without_ids_is_one_document():
    one = segments.describe_segments(None, 2, LENGTH)
    same = segments.describe_segments(jnp.ones((2, LENGTH), jnp.int32), 2, LENGTH)
    for name in ("start", "end", "valid", "position"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
    assert not one.packed
    assert same.packed
