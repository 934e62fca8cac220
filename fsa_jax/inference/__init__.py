"""Inference with a cache: the keys and values of sequences, and attention of new tokens to them.

The attention layers append a chunk of tokens to a cache (`kv_cache`, `nsa_cache`), whose pages the
host hands out to sequences (`page_allocator`); then the queries of the chunk attend to the cache
(`cached_attention`), on a GPU by the kernels of decoding (`decode_step`).
"""
