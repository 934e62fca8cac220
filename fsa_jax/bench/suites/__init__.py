"""The suites of `fsa-jax bench`: attention and its branches, decoding steps, and whole models.

A suite iterates over its cases, has `fsa_jax.bench.measure` measure and check each of them, and
yields result rows, which `fsa_jax.bench.run` writes as JSON.
"""
