"""Tests of the rules that every implementation obeys."""
