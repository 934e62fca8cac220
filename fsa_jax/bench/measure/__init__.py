"""How `fsa-jax bench` measures one function: timing, device limits, correctness, rival kernels.

The suites pass compiled functions and their inputs, and get times in milliseconds, or an error if a
result is wrong.
"""
