"""The operations: backends, gradients, and how a call divides over devices."""
