"""`fsa-jax bench` and `fsa-jax tune`, and their reports."""
