"""Benchmarks: `fsa-jax bench`, `fsa-jax tune`, and compiling for GPUs on a machine without one.

`run` has the suites of `suites` measure their cases by way of `measure`, and writes JSON; `report`
turns that into a page and plots. `cases` holds shapes, inputs and the work that they must do.
`tune` times the tiles of kernels and writes the tables that these look up. `ahead_of_time` compiles
functions for a GPU by its description, at the named `shapes`; tests use both.
"""
