"""What `fsa-jax bench` measures: attention and its branches, steps of decoding, whole models.

A suite goes through its cases, has each measured and checked by `fsa_jax.bench.measure`, and yields
rows of numbers, which `fsa_jax.bench.run` writes as JSON.
"""
