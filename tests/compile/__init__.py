"""Programs compiled for GPUs on a machine without one; see the group `compile`."""
