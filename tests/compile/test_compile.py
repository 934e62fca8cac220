"""The kernels compile for their GPUs, within memory and register limits; nothing is run."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from compile.programs import TRITON
from fsa_jax.bench.ahead_of_time import (
    compile_for,
    custom_calls,
    empty_kernels,
    lower_for,
    operator_gradients,
    selected_gradients,
)
from fsa_jax.bench.shapes import KERNELS, Shape
from fsa_jax.pallas import SelectedTuning

pytestmark = pytest.mark.compile
ROOT = Path(__file__).resolve().parents[2]
QUERY_OUTER = {"tuning": SelectedTuning(method="query_outer")}
# H200 and H100 differ only in memory, so their code is the same except for measured tiles.
OPERATOR_CASES = [
    # g1_mha is below; g2 is compiled under vmap.
    *(("H100", name, {}) for name in KERNELS if name not in ("g1_mha", "g2")),
    *((device, name, {}) for device in ("A100", "L40", "B200") for name in ("main", "g8_widest")),
    ("A100", "g5_odd", {"dtype": jnp.float32}),
    ("H200", "g1_mha", {"packed": True}),
]
CASES = [
    # The other shapes are covered by the whole operator.
    *(("A100", name, {}) for name in KERNELS if name not in ("main", "g8_widest")),
    ("L40", "g32_mqa", {}),
    ("B200", "g32_mqa", {}),
    ("A100", "main", {"dtype": jnp.float16}),
    ("H200", "g5_odd", {"dtype": jnp.float16}),
    ("L40", "g5_odd", {"dtype": jnp.float32}),
    ("H200", "g2", {"dtype": jnp.float32}),
    ("A100", "g3_wide", QUERY_OUTER),
    ("L40", "g8_widest", QUERY_OUTER),
    ("H200", "main", QUERY_OUTER),
    ("B200", "g32_mqa", QUERY_OUTER),
]


def case_id(case):
    device, name, options = case
    words = (getattr(x, "__name__", None) or getattr(x, "method", x) for x in options.values())
    return "-".join((device, name, *(str(word) for word in words)))


def compiled_text(device, *program):
    text = compile_for(device, *program).as_text()
    assert text is not None
    return text


def array_sizes(text):
    """Returns the element counts of all arrays that appear in the text of a program."""
    shapes = re.findall(r"\b(?:pred|bf16|[sufc]\d+)\[([\d,]+)\]", text)
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


@pytest.mark.essential_cases("A100-g3_wide", "H200-main-query_outer")
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_selected_attention_compiles(case):
    device, name, options = case
    program = selected_gradients(KERNELS[name], implementation="triton", **options)
    assert set(custom_calls(compiled_text(device, *program))) == {TRITON}


@pytest.mark.essential_cases("H100-main", "B200-main")
@pytest.mark.parametrize("case", OPERATOR_CASES, ids=case_id)
def test_the_operator_compiles(case):
    """Compiles forward and backward of all branches and the selection."""
    device, name, options = case
    program = operator_gradients(KERNELS[name], implementation="triton", **options)
    assert set(custom_calls(compiled_text(device, *program))) == {TRITON}


def test_a_vmapped_call_compiles():
    run, *shapes = operator_gradients(KERNELS["g2"], implementation="triton")
    shapes = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in shapes]
    assert set(custom_calls(compiled_text("H200", jax.vmap(run), *shapes))) == {TRITON}


@pytest.mark.essential
def test_the_automatic_choice_is_by_the_device_compiled_for():
    run, *shapes = operator_gradients(KERNELS["g2"])
    lowered = lower_for("H200", run, *shapes).as_text()
    assert set(custom_calls(lowered)) == {TRITON}
    assert "triton" not in jax.jit(run).lower(*shapes).as_text()
    # This is traced as for a GPU, but lowered for a CPU.
    assert "triton" not in lower_for("H200", run, *shapes, lowering_platforms=("cpu",)).as_text()


def test_empty_kernels_take_the_same_memory_and_calls():
    """Validates the assumption behind the `empty_kernels` fixture."""

    def look():
        compiled = compile_for("H200", *operator_gradients(KERNELS["g2"], implementation="triton"))
        found, text = compiled.memory_analysis(), compiled.as_text()
        assert found is not None
        assert text is not None
        sizes = found.temp_size_in_bytes, found.argument_size_in_bytes, found.output_size_in_bytes
        return (*sizes, found.alias_size_in_bytes), custom_calls(text), len(text)

    *whole, length = look()
    with empty_kernels():
        *empty, shorter = look()
    assert empty == whole
    assert shorter < length  # the kernels are empty


@pytest.mark.usefixtures("empty_kernels")
def test_memory_is_linear_in_the_tokens_and_within_the_scratch_budget():
    def memory(length, tuning=None):
        shape = dataclasses.replace(KERNELS["main"], length=length, heads=8)
        program = selected_gradients(shape, implementation="triton", tuning=tuning)
        found = compile_for("H200", *program).memory_analysis()
        assert found is not None
        return found

    def peak(found):
        return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes

    small, middle, large = memory(16384), memory(65536), memory(262144)
    assert peak(middle) <= 4.2 * peak(small)
    assert peak(large) <= 4.2 * peak(middle)
    assert middle.temp_size_in_bytes <= 2**31
    less = memory(65536, SelectedTuning(scratch_bytes=2**28))
    assert less.temp_size_in_bytes < middle.temp_size_in_bytes


@pytest.mark.usefixtures("empty_kernels")
def test_a_million_tokens_fit_one_gpu():
    """Compiles the whole operator on packed sequences, forward and backward."""

    def peak(length):
        shape = Shape(
            length=length, heads=8, kv_heads=2, width=128, value_width=128, block_size=64, slots=16
        )
        program = operator_gradients(shape, implementation="triton", packed=True)
        found = compile_for("H200", *program).memory_analysis()
        assert found is not None
        return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes

    small, middle, large = peak(2**16), peak(2**18), peak(2**20)
    assert middle <= 4.2 * small
    assert large <= 4.2 * middle
    assert large <= 40e9


# With narrow heads and little scratch, arrays linear in the tokens are smaller than the table.
NARROW = Shape(length=65536, heads=4, kv_heads=2, width=32, value_width=32, block_size=64, slots=16)


@pytest.mark.essential_cases("True")
@pytest.mark.usefixtures("empty_kernels")
@pytest.mark.parametrize("packed", [False, True])
def test_no_array_is_tokens_by_blocks_and_nothing_leaves_the_device(packed):
    tuning = SelectedTuning(scratch_bytes=2**24)
    program = selected_gradients(NARROW, implementation="triton", tuning=tuning, packed=packed)
    text = compiled_text("H200", *program)
    sizes = array_sizes(text)
    # the query's size is found, so sizes are parsed
    assert NARROW.length * NARROW.heads * NARROW.width in sizes
    assert max(sizes) < NARROW.length * NARROW.blocks
    assert set(custom_calls(text)) == {TRITON}
    assert not re.search(r" (infeed|outfeed|send|recv)\(", text)


def test_the_measure_sees_an_array_of_tokens_by_blocks():
    """Checks that the measure detects a table of tokens by blocks."""

    def choices(indices):
        table = jax.nn.one_hot(indices[0, :, 0, 0], NARROW.blocks, dtype=jnp.bfloat16)
        return table @ table.T[:, :8]

    text = compiled_text("H200", choices, jax.ShapeDtypeStruct(NARROW.indices, jnp.int32))
    assert max(array_sizes(text)) >= NARROW.length * NARROW.blocks


GROUPS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16]


@pytest.mark.essential_cases("query_outer_packed-kernels3-groups3")
@pytest.mark.parametrize(
    ("method", "kernels", "groups"),
    [
        ("kv_outer", ("forward", "backward"), GROUPS),
        (
            "compressed",
            ("range_forward", "range_query_gradient", "range_key_gradient", "score"),
            GROUPS,
        ),
        # On packed sequences, a program has several work items.
        ("kv_outer_packed", ("forward", "backward"), [1, 3, 4, 8]),
        ("query_outer_packed", ("block_key_gradient",), [3, 8]),
        # These are the groups for which the block lists may choose these kernels.
        ("query_tile", ("query_tile", "query_tile_gradient"), GROUPS[2:]),
        ("query_outer", ("block_key_gradient",), GROUPS[2:]),
    ],
)
def test_matrix_kernels_stay_in_registers_and_use_the_wide_instructions(
    method, kernels, groups, tmp_path
):
    out = tmp_path / "resources.json"
    arguments = ["--devices", "H200", "--methods", method, "--out", out]
    arguments += ["--groups", *map(str, groups)]
    script = ROOT / "benchmarks" / "resources.py"
    subprocess.run([sys.executable, script, *arguments], check=True)
    rows = json.loads(out.read_text())["rows"]
    for kernel in kernels:
        found = {row["group"]: row for row in rows if row["kernel"] == f"{kernel}_kernel"}
        assert sorted(found) == groups
        for row in found.values():
            assert row["spill_store_bytes"] == row["spill_load_bytes"] == 0, row
            assert row["wgmma"] > 0, row
            assert row["mma_sync"] == 0, row
