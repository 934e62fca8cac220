"""Benchmarks: what `fsa-jax bench` runs, and the report made from its JSON."""
