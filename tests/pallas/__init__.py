"""Tests of the kernels in interpret mode against float64 references or dense attention."""
