"""Tables of `fsa-jax tune`, a JSON file a device, that the kernels take; see `tuned.py`."""
