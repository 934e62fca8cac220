"""The report of `fsa-jax bench`: a Markdown page with plots.

`results` reads and compares the rows of the JSON files; `markdown` and `plots` present them.
"""
