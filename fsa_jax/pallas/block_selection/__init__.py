"""Kernels of block selection, which choose the blocks that each query attends to.

`plan` chooses the sizes; `passes` runs over chunks of heads and tokens. For each chunk,
`score_kernel` writes the ranks of all blocks and `choose_kernel` selects the best of them.
"""
