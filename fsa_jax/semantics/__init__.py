"""The rules of native sparse attention that every implementation obeys.

These modules define what packed sequences imply (documents, compressed windows, which query sees
which key), how blocks are ranked and chosen, and in which dtype sums are accumulated. They are
plain JAX on small integer arrays. The public functions describe each call once and pass that
description to the XLA implementation, the kernels and the reference alike.
"""
