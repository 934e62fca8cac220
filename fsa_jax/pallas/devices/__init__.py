"""Tables of `fsa-jax tune`, a JSON file a device, that the kernels take; see `tile_tables.py`."""
