"""Tests of the decoding kernels on an NVIDIA GPU. See test_gpu.py and pallas/test_decode.py."""

from pallas.test_decode import (
    test_a_bound_on_the_entries_changes_rounding_alone,
    test_a_query_sees_a_range,
    test_a_query_sees_its_blocks,
    test_a_step_is_the_end_of_the_whole_sequence,
    test_any_scale,
    test_bitwise_the_same_on_every_rerun,
    test_logits_of_ten_thousand,
    test_nothing_between_the_ranges_of_two_queries_is_read,
    test_pages_outside_the_pool_count_as_nothing,
    test_selection_is_that_of_the_portable_path,
    test_splits_and_tiles_change_rounding_alone,
)

from gpu.shared import dirty_memory, pytestmark

__all__ = [  # used by pytest
    "dirty_memory",
    "pytestmark",
    "test_a_bound_on_the_entries_changes_rounding_alone",
    "test_a_query_sees_a_range",
    "test_a_query_sees_its_blocks",
    "test_a_step_is_the_end_of_the_whole_sequence",
    "test_any_scale",
    "test_bitwise_the_same_on_every_rerun",
    "test_logits_of_ten_thousand",
    "test_nothing_between_the_ranges_of_two_queries_is_read",
    "test_pages_outside_the_pool_count_as_nothing",
    "test_selection_is_that_of_the_portable_path",
    "test_splits_and_tiles_change_rounding_alone",
]
