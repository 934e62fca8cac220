"""The rules that every implementation obeys."""
