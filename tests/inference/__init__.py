"""Caches, their pages, and attention to them."""
