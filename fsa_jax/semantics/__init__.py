"""The rules of native sparse attention, which hold for every implementation.

`segments` derives from segment ids where documents start and end, which compressed windows exist
and which keys each query sees. `selection_rule` ranks the blocks of a query and chooses the best of
them. `precision` names the dtype in which sums are accumulated. All of it is plain JAX.

A call describes its documents once, as a `SegmentInfo`; the reference, the XLA implementation and
the kernels all work from that description.
"""
