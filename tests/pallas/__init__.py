"""The kernels in interpret mode: each computation against float64 or dense attention."""
