"""Tests of caches, their pages, and attention to cached tokens."""
