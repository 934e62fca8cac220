"""Kernels of selected attention: each query attends to a list of blocks of keys.

`plan` chooses the method and the sizes, `passes` runs the kernels of a forward or backward pass
over chunks of heads and tokens. The KV-outer method inverts the lists into a `query_index`, which
holds the queries of each block; programs walk its entries (`work_item`), and `merge_partials`
reduces the partial results of each query. In the query-outer and query-tile methods, programs own
queries.
"""
