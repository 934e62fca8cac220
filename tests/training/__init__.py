"""The trainer: data, steps, runs, processes."""
