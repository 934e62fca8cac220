"""What is made of the results of `fsa-jax bench`: a page in Markdown, and its plots.

`results` reads the JSON files and answers questions about their rows; `markdown` and `plots` show
them.
"""
