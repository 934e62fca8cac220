"""Named shapes of the attention functions, for tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """B sequences of T tokens, N query heads, K key/value heads, head widths D and E, S slots."""

    batch: int = 1
    length: int
    heads: int
    kv_heads: int
    width: int = 16
    value_width: int = 16
    block_size: int = 16
    slots: int = 4

    @property
    def query(self):
        return (self.batch, self.length, self.heads, self.width)

    @property
    def key(self):
        return (self.batch, self.length, self.kv_heads, self.width)

    @property
    def value(self):
        return (self.batch, self.length, self.kv_heads, self.value_width)

    @property
    def indices(self):
        return (self.batch, self.length, self.kv_heads, self.slots)

    @property
    def blocks(self):
        return -(-self.length // self.block_size)


# Shapes small enough for the dense float64 reference on a CPU.
SMALL = {
    "mha": Shape(length=70, heads=2, kv_heads=2),
    "g2_batch": Shape(batch=3, length=50, heads=4, kv_heads=2, width=8, value_width=12),
    "g3_odd": Shape(length=61, heads=3, kv_heads=1, width=5, value_width=7, block_size=9, slots=3),
    "g5": Shape(length=40, heads=10, kv_heads=2, width=8, value_width=8),
    "g16_mqa": Shape(length=33, heads=16, kv_heads=1, width=4, value_width=4),
    "one_token": Shape(length=1, heads=2, kv_heads=1),
    "one_slot": Shape(length=40, heads=2, kv_heads=1, slots=1),
    "many_slots": Shape(length=150, heads=2, kv_heads=1, width=4, block_size=4, slots=40),
    "many_tiles": Shape(batch=2, length=400, heads=2, kv_heads=1, width=4, value_width=4),
}

# Training sizes for the kernels, with every group size, width and block size at least once.
KERNELS = {
    "main": Shape(
        length=8192, heads=16, kv_heads=4, width=128, value_width=128, block_size=64, slots=16
    ),
    "g1_mha": Shape(
        batch=2, length=2048, heads=2, kv_heads=2, width=64, value_width=64, block_size=64, slots=16
    ),
    "g2": Shape(
        length=2048, heads=4, kv_heads=2, width=128, value_width=64, block_size=32, slots=8
    ),
    "g3_wide": Shape(
        length=2000, heads=6, kv_heads=2, width=192, value_width=128, block_size=64, slots=16
    ),
    "g5_odd": Shape(
        length=1999, heads=10, kv_heads=2, width=80, value_width=96, block_size=32, slots=5
    ),
    "g6_many_slots": Shape(
        length=2048, heads=6, kv_heads=1, width=96, value_width=80, block_size=16, slots=64
    ),
    "g7_wide_value": Shape(
        length=2048, heads=7, kv_heads=1, width=32, value_width=256, block_size=64, slots=3
    ),
    "g8_widest": Shape(
        length=2048, heads=16, kv_heads=2, width=256, value_width=256, block_size=64, slots=16
    ),
    "g12_one_slot": Shape(
        length=2048, heads=12, kv_heads=1, width=128, value_width=192, block_size=128, slots=1
    ),
    "g16_mqa": Shape(
        length=2048, heads=16, kv_heads=1, width=128, value_width=128, block_size=64, slots=16
    ),
    "g32_mqa": Shape(
        length=2048, heads=32, kv_heads=1, width=64, value_width=32, block_size=128, slots=32
    ),
}
