"""The rules of native sparse attention that every implementation obeys.

What packed sequences imply (documents, windows, which query sees which key), how blocks are ranked
and chosen, and in which dtype sums are taken. Everything here is plain JAX on small integer arrays:
the public functions describe a call once, and hand the description down to the portable loops, the
kernels and the reference alike.
"""
