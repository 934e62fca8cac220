"""Folds the weights of a tile of windows into the blocks of the tile, within registers.

The matrix unit leaves a row of a tile in four threads, each of which has the columns 8i + 2t + e
(i < 16; e < 2) of thread t. Keys are ordered such that these are 32 windows in sequence, 32t + 2i +
e, so nearly all sums of a block are within a thread.

Shapes: a tile has 64 rows and KEYS windows; a block is r strides long, a window q strides.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, nvvm, vector

from fsa_jax.pallas.range_attention.hopper_layout import ROWS

#: Windows of a tile, and windows of a row that are in one thread.
KEYS, OF_THREAD = 128, 32
#: Numbers that a thread stores at a time; those of the four threads of a row follow one another.
MOST_STORED = 4
#: Steps whose pairs of numbers of a row follow one another, in a sector of memory.
EDGES = 4


def window_of_column(column):
    """The window of a tile that stands in a column."""
    return (column >> 1 & 3) * OF_THREAD + (column >> 3) * 2 + (column & 1)


def column_of_block(block, per_block: int):
    """The column of a row of the fold in which a block of the tile stands."""
    of_thread = OF_THREAD // per_block
    step = min(MOST_STORED, of_thread)
    thread, place = block // of_thread, block % of_thread
    return place // step * (4 * step) + thread * step + place % step


def shares(per_block: int, per_window: int) -> dict[int, int]:
    """How many strides a block shares with the window at each offset from the block's first."""
    return {
        offset: min(offset + per_window, per_block) - max(offset, 0)
        for offset in range(1 - per_window, per_block)
    }


def fold_in_registers(p, row_max, stored, fold_ref, edge_ref, per_block: int, per_window: int):
    """Writes the fold of a tile, and what it hands over to the next one; returns the rows' sums.

    Each window counts q times in the sum of a fold and of what is handed over, so that sum takes
    fewer additions than that of the weights themselves.

    Args:
      p: float32 [64, KEYS], accumulators of the matrix unit.
      row_max: float32 [64].
      stored: int32, whether anything is written: 0 or 1.
      fold_ref: ref of float32 [64, KEYS / r] in device memory, for sums over the windows of the
        tile.
      edge_ref: ref of float32 [64, 2] in device memory, for `row_max` and for the share that the
        first block of the next tile has in the windows of this one.
      per_block: r.
      per_window: q.
    """
    weights = shares(per_block, per_window)

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WGMMA,
            plgpu.Layout.WGMMA.reduce(1),
            plgpu.Layout.WG_SPLAT,
            plgpu.RefType(),
            plgpu.RefType(),
        ),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, plgpu.Layout.WGMMA.reduce(1)),
    )
    def write(_, p, row_max, stored, fold_ref, edge_ref):
        thread, sums = _Thread(stored.registers.item()), row_max.registers.copy()
        for half in range(2):
            windows = _windows_of_row(p, half)
            carry = thread.weighted(
                windows, {OF_THREAD + o: w for o, w in weights.items() if o < 0}
            )
            blocks = []
            for first in range(0, OF_THREAD, per_block):
                of_block = {first + offset: weight for offset, weight in weights.items()}
                blocks.append(thread.weighted(windows, of_block))
            whole = blocks if carry is None else [*blocks, carry]
            total = thread.sum_of_row(thread.sum(whole), 1 / per_window)
            sums.reshape(-1)[half] = vector.broadcast(row_max.registers.flat[0].type, total)
            if carry is not None:
                blocks[0] = thread.plus_of_previous(blocks[0], carry)
            thread.store_row(fold_ref, half, blocks)
            thread.store_edge(edge_ref, half, [_of_row(row_max, half), carry])
        return FragmentedArray(_registers=sums, _layout=row_max.layout, _is_signed=None)

    run: Any = write  # the decorator takes the context away from the arguments
    return run(p, row_max, stored, fold_ref, edge_ref)


def fold_by_columns(p, per_block: int, per_window: int):
    """The same in plain JAX, for interpret mode: the fold and what is handed over."""
    windows = p.reshape(ROWS, OF_THREAD // 2, 4, 2).transpose(0, 2, 1, 3)
    windows = windows.reshape(ROWS, KEYS // per_block, per_block)
    fold, moved = 0.0, 0.0
    for offset, weight in shares(per_block, per_window).items():
        if offset >= 0:
            fold += weight * windows[:, :, offset]
        else:
            moved += weight * windows[:, :, per_block + offset]
    moved = jnp.pad(moved, ((0, 0), (1, 0))) if per_window > 1 else jnp.zeros_like(fold)
    of_thread = OF_THREAD // per_block
    step = min(MOST_STORED, of_thread)
    whole = fold + moved[:, : KEYS // per_block]
    whole = whole.reshape(ROWS, 4, of_thread // step, step).transpose(0, 2, 1, 3)
    return whole.reshape(ROWS, -1), moved[:, -1]


def _windows_of_row(p, half):
    """The weights of a thread's row, in the order of the windows: `half` 0 or 1."""
    pairs = p.registers.reshape(-1, 2)[:, half]
    return [
        vector.extract(pair, dynamic_position=[], static_position=[e])
        for pair in pairs
        for e in range(2)
    ]


def _of_row(x, half):
    value = x.registers.reshape(-1)[half]
    return vector.extract(value, dynamic_position=[], static_position=[0])


class _Thread:
    """A thread's place in a tile, and operations of a thread, which may store nothing."""

    def __init__(self, stored):
        i32 = ir.IntegerType.get_signless(32)
        self.stored = arith.cmpi(arith.CmpIPredicate.ne, stored, utils.c(0, i32))
        thread = arith.andi(utils.thread_idx(), utils.c(127, i32))
        self.quarter = arith.andi(thread, utils.c(3, i32))
        warp, lane = (
            arith.shrui(thread, utils.c(5, i32)),
            arith.andi(thread, utils.c(31, i32)),
        )
        self.row = arith.addi(
            arith.muli(warp, utils.c(16, i32)), arith.shrui(lane, utils.c(2, i32))
        )

    def weighted(self, windows, weights):
        """The sum of weight * windows[number] over the windows that are in this thread."""
        f32 = ir.F32Type.get()
        by_weight = {}
        for number, weight in weights.items():
            if 0 <= number < len(windows):
                by_weight.setdefault(weight, []).append(windows[number])
        total = self.sum(by_weight.pop(1)) if 1 in by_weight else None
        for weight, some in by_weight.items():
            part, weight = self.sum(some), utils.c(float(weight), f32)
            total = arith.mulf(part, weight) if total is None else math.fma(part, weight, total)
        return total

    def sum(self, values):
        """The sum of values, in pairs."""
        while len(values) > 1:
            pairs = [arith.addf(*values[i : i + 2]) for i in range(0, len(values) - 1, 2)]
            values = pairs + values[len(values) // 2 * 2 :]
        return values[0]

    def sum_of_row(self, x, factor):
        """The sum of x over the four threads of a row, times a factor."""
        for distance in (1, 2):
            x = arith.addf(x, utils.shfl_bfly(x, distance))
        return arith.mulf(x, utils.c(factor, ir.F32Type.get()))

    def plus_of_previous(self, x, carry):
        """X plus the carry of the thread with the windows before; the first has none."""
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        bits = arith.bitcast(i32, carry)
        everyone, clamp = utils.c(-1, i32), utils.c(0, i32)
        moved = nvvm.shfl_sync(
            everyone, bits, utils.c(1, i32), clamp, nvvm.ShflKind.up, results=[i32]
        )
        first = arith.cmpi(arith.CmpIPredicate.eq, self.quarter, utils.c(0, i32))
        moved = arith.select(first, utils.c(0.0, f32), arith.bitcast(f32, moved))
        return arith.addf(x, moved)

    def store_row(self, ref, half, blocks):
        """Stores this thread's blocks of a row [64, blocks], up to four at a time."""
        i32 = ir.IntegerType.get_signless(32)
        step = min(MOST_STORED, len(blocks))
        place = arith.muli(self.quarter, utils.c(step, i32))
        place = arith.addi(self._offset(ref, half), place)
        for i in range(0, len(blocks), step):
            part = arith.addi(place, utils.c(4 * i, i32))
            self._store(ref, part, blocks[i : i + step], self.stored)

    def store_edge(self, ref, half, values):
        """Stores a row's pair of numbers, by the thread with the last windows."""
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        values = [utils.c(0.0, f32) if x is None else x for x in values]
        last = arith.cmpi(arith.CmpIPredicate.eq, self.quarter, utils.c(3, i32))
        self._store(ref, self._offset(ref, half), values, arith.andi(last, self.stored))

    def _offset(self, ref, half):
        """Where this thread's row begins."""
        i32 = ir.IntegerType.get_signless(32)
        (stride, _), _ = ir.MemRefType(ref.type).get_strides_and_offset()
        row = arith.addi(self.row, utils.c(8 * half, i32))
        return arith.muli(row, utils.c(stride, i32))

    def _store(self, ref, place, values, predicate):
        f32 = ir.F32Type.get()
        pointer = llvm.addrspacecast(llvm.PointerType.get(1), utils.memref_ptr(ref))
        pointer = utils.getelementptr(pointer, [place], f32)
        packed = llvm.mlir_undef(ir.VectorType.get((len(values),), f32))
        for i, x in enumerate(values):
            packed = vector.insert(x, packed, dynamic_position=[], static_position=[i])
        with utils.when(predicate):
            llvm.store(packed, pointer, alignment=4 * len(values))
