"""Kernels of block selection: which blocks each query attends to.

`plan` chooses the sizes; `passes` goes over chunks of heads and tokens, and for each of them has
`score_kernel` write the ranks of all blocks and `choose_kernel` take the best of them.
"""
