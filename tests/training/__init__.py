"""Tests of the trainer: data, steps, runs, processes."""
