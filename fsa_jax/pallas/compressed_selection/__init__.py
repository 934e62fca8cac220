"""Compressed attention and the selection of blocks in one pass over the compressed keys, on Hopper.

`placement` lines the compressed keys up with blocks. `passes` runs over chunks of queries. For each
chunk, `fold_kernel` computes attention and writes the weights of each row, folded into blocks, and
`choose_kernel` sums them over the heads of a group and selects the best blocks.
"""
