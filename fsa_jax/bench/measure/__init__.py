"""How `fsa-jax bench` measures one function: times, bounds of the device, correctness, rivals.

Suites pass in compiled functions and their inputs, and get back times in milliseconds, or an error
where a result is wrong.
"""
