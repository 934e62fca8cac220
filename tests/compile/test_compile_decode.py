"""The decoding kernels compile for their GPUs, within registers; nothing is run."""

import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from compile.programs import TRITON
from fsa_jax.bench.ahead_of_time import compile_for, custom_calls, decode_step
from fsa_jax.pallas.decode import attention

pytestmark = pytest.mark.compile
sys.path.append(str(Path(__file__).resolve().parents[2]))
resources = importlib.import_module("benchmarks.resources")

LENGTH, HEADS = 131072, {"heads": 32, "kv_heads": 8}
#: Device, queries per sequence, heads per group, D, E, dtype; every value occurs at least once.
SIZES = [
    ("H200", 1, 1, 64, 64, "bfloat16"),
    ("A100", 1, 3, 32, 256, "float32"),
    ("H200", 1, 5, 80, 96, "float16"),
    ("A100", 1, 16, 256, 256, "bfloat16"),
    ("H200", 1, 16, 256, 256, "float32"),
    ("H100", 3, 12, 192, 128, "bfloat16"),
    ("A100", 2, 5, 96, 80, "float32"),
    ("H200", 8, 4, 128, 128, "bfloat16"),
    ("L40", 8, 16, 256, 256, "bfloat16"),
    ("H200", 8, 16, 128, 192, "float16"),
    ("B200", 1, 4, 128, 128, "bfloat16"),
]


def assert_in_registers(rows):
    """Asserts that nothing is spilled and that key tiles are prefetched."""
    for row in rows:
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == 0, row
        assert row["cp_async"] > 0 or not row["kernel"].startswith("paged"), row


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("device", ["H200", "H100", "A100"])
def test_a_step_at_128k_needs_no_memory_and_stays_in_registers(device, batch):
    program = decode_step(length=LENGTH, batch=batch, **HEADS)
    compiled = compile_for(device, *program)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    assert set(custom_calls(text)) == {TRITON}
    # Scratch holds the logits of the compressed keys, and at most as many bytes of partial sums:
    # no pool is copied.
    logits = 4 * batch * HEADS["heads"] * LENGTH // 16
    assert memory.temp_size_in_bytes <= 2 * logits
    assert logits < 2**25 < memory.argument_size_in_bytes
    if device != "H100":  # an H100 gets the same code as an H200
        rows = resources.look(resources.find_ptxas(), device, program, resources.METHODS["decode"])
        names = {re.sub(r"__\d+$", "", row["kernel"]) for row in rows}
        assert names == set(resources.METHODS["decode"])
        assert_in_registers(rows)


@pytest.mark.essential_cases("H200-8-4-128-128-bfloat16")
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_kernels_of_all_sizes_stay_in_registers(sizes):
    device, tokens, group, width, value_width, dtype = sizes
    kv_heads, page, columns, slots = 8, 64, 512, 16

    def run(query, key, value, pages, places, lists):
        low, high = places, places + 1
        entries = attention.range_attention(
            query, key[:, :4], value[:, :4], pages, low, high, scale=0.1, logits=True
        )
        window = attention.range_attention(query, key, value, pages, low, high, scale=0.1, most=512)
        return entries, window, attention.block_attention(
            query, key, value, pages, lists, high, scale=0.1
        )  # fmt: skip

    floats = (
        (1, tokens, group * kv_heads, width),
        (columns, page, kv_heads, width),
        (columns, page, kv_heads, value_width),
    )
    integers = ((1, columns), (1, tokens), (1, tokens, kv_heads, slots))
    shapes = [jax.ShapeDtypeStruct(x, jnp.dtype(dtype)) for x in floats]
    shapes += [jax.ShapeDtypeStruct(x, jnp.int32) for x in integers]
    kernels = resources.METHODS["decode"][:3]
    rows = resources.look(resources.find_ptxas(), device, (run, *shapes), kernels)
    assert len({row["kernel"] for row in rows}) >= 4
    assert_in_registers(rows)


def test_offsets_of_64_bits_fit_the_registers_too():
    """Pools of more than 2^32 bytes need such offsets, as the pools of all layers do."""
    program = decode_step(length=LENGTH, layers=32, **HEADS)
    assert program[2].key.size * program[2].key.dtype.itemsize > 2**32
    assert_in_registers(
        resources.look(resources.find_ptxas(), "H200", program, resources.METHODS["decode"])
    )
