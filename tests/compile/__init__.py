"""Programs compiled for GPUs on a machine without one; the tests have the marker `compile`."""
