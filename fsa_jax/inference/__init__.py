"""Inference with a cache: the keys and values of sequences, and attention of new tokens to them.

The attention layers append a chunk of tokens to a cache (`kv_cache`, `nsa_cache`), whose pages are
assigned to sequences on the host (`page_allocator`). Then the queries of the chunk attend to the
cache (`cached_attention`); on a GPU, decoding uses its own kernels (`decode_step`).
"""
