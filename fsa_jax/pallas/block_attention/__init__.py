"""Kernels of selected attention: each query attends to a list of blocks of keys.

`plan` chooses the method and the sizes, `passes` runs the kernels of a forward or backward pass
over chunks of heads and tokens. By the KV-outer method the lists are turned into a `query_index` of
the queries of each block, programs walk its entries (`work_item`), and `merge_partials` adds up
what they leave for each query. By the query-outer and query-tile methods programs own queries.
"""
