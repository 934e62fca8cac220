"""The sizes that define the function computed by native sparse attention, and nothing else."""

import dataclasses

from fsa_jax.arguments import scalars


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """Sizes of native sparse attention (NSA, arXiv 2502.11089).

    All sizes are in tokens, except ``topk``, ``init_blocks`` and ``local_blocks``, which count
    blocks. Tile sizes, warps and other performance options are not part of this class.

    Attributes:
      kernel_size: tokens that one compressed key summarises (the paper's l).
      kernel_stride: tokens between the starts of two compressed windows (the paper's d).
      block_size: tokens of one selectable block (the paper's l').
      topk: blocks that each query may select, including the forced ones (the paper's n).
      init_blocks: blocks at the start of a document that every query selects.
      local_blocks: most recent blocks, including the query's own, that every query selects.
      window_size: keys in the sliding window of a query, including the query's own token.

    Raises:
      ValueError: a size is not a positive integer (``init_blocks`` and ``local_blocks`` may be 0),
        ``kernel_size`` or ``block_size`` is not a multiple of ``kernel_stride``, or ``topk`` is
        below ``init_blocks + local_blocks``.

    Example:
      >>> from fsa_jax import NSAConfig
      >>> NSAConfig(block_size=32, topk=8).num_blocks(100)
      4
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    topk: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 512

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 0 if field.name in ("init_blocks", "local_blocks") else 1
            value = scalars.size(field.name, getattr(self, field.name), least)
            object.__setattr__(self, field.name, value)  # NumPy integers cannot be written as JSON
        check_window(self.kernel_size, self.kernel_stride)
        if self.block_size % self.kernel_stride:
            raise ValueError(
                f"block_size must be a multiple of kernel_stride, got block_size={self.block_size} "
                f"and kernel_stride={self.kernel_stride}"
            )
        if self.topk < self.init_blocks + self.local_blocks:
            raise ValueError(
                f"topk must be at least init_blocks + local_blocks, got topk={self.topk}, "
                f"init_blocks={self.init_blocks} and local_blocks={self.local_blocks}"
            )

    def num_blocks(self, length: int) -> int:
        """Number of selectable blocks in `length` tokens, including a shorter last one."""
        return -(-length // self.block_size)


def check_window(kernel_size: int, kernel_stride: int) -> None:
    """Raises ValueError unless `kernel_size` is a positive multiple of `kernel_stride`."""
    if kernel_size < 1 or kernel_stride < 1 or kernel_size % kernel_stride:
        raise ValueError(
            "kernel_size must be a positive multiple of kernel_stride, got "
            f"kernel_size={kernel_size} and kernel_stride={kernel_stride}"
        )
