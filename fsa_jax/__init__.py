"""Native sparse attention (NSA) for JAX: the operator, its branches, and inference with a cache."""

from typing import TYPE_CHECKING

from fsa_jax import lazy

if TYPE_CHECKING:
    from fsa_jax.api import (
        CHECKPOINT_NAMES,
        causal_attention,
        compress,
        compressed_attention,
        native_sparse_attention,
        select_blocks,
        selected_attention,
        sliding_window_attention,
    )
    from fsa_jax.arguments.types import CompressionMethod, Implementation
    from fsa_jax.config import NSAConfig
    from fsa_jax.generation import generate
    from fsa_jax.inference.kv_cache import KVCache
    from fsa_jax.inference.nsa_cache import NSACache
    from fsa_jax.inference.page_allocator import OutOfPages, PageAllocator
    from fsa_jax.losses import cross_entropy
    from fsa_jax.ops.dispatch import explain
    from fsa_jax.positions import token_positions, window_positions
    from fsa_jax.pretrained import load_pretrained, save_pretrained
    from fsa_jax.rope import (
        LinearScaling,
        Llama3Scaling,
        RoPE,
        RotaryEmbedding,
        YarnScaling,
    )
    from fsa_jax.sequence_parallel.zigzag import (
        from_stripes,
        from_zigzag,
        to_stripes,
        to_zigzag,
    )

__version__ = "0.1.0"

__all__ = [
    "CHECKPOINT_NAMES",
    "CompressionMethod",
    "Implementation",
    "KVCache",
    "LinearScaling",
    "Llama3Scaling",
    "NSACache",
    "NSAConfig",
    "OutOfPages",
    "PageAllocator",
    "RoPE",
    "RotaryEmbedding",
    "YarnScaling",
    "causal_attention",
    "compress",
    "compressed_attention",
    "cross_entropy",
    "explain",
    "from_stripes",
    "from_zigzag",
    "generate",
    "load_pretrained",
    "native_sparse_attention",
    "save_pretrained",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "to_stripes",
    "to_zigzag",
    "token_positions",
    "window_positions",
]

__getattr__, __dir__ = lazy.exports(
    __name__,
    {
        "api": [
            "CHECKPOINT_NAMES",
            "causal_attention",
            "compress",
            "compressed_attention",
            "native_sparse_attention",
            "select_blocks",
            "selected_attention",
            "sliding_window_attention",
        ],
        "inference.kv_cache": ["KVCache"],
        "inference.nsa_cache": ["NSACache"],
        "config": ["NSAConfig"],
        "generation": ["generate"],
        "losses": ["cross_entropy"],
        "ops.dispatch": ["explain"],
        "arguments.types": ["CompressionMethod", "Implementation"],
        "inference.page_allocator": ["OutOfPages", "PageAllocator"],
        "positions": ["token_positions", "window_positions"],
        "pretrained": ["load_pretrained", "save_pretrained"],
        "rope": ["LinearScaling", "Llama3Scaling", "RoPE", "RotaryEmbedding", "YarnScaling"],
        "sequence_parallel.zigzag": [
            "from_stripes",
            "from_zigzag",
            "to_stripes",
            "to_zigzag",
        ],
    },
)
