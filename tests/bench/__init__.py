"""Tests of `fsa-jax bench` and `fsa-jax tune`, and of their reports."""
