"""The operator compiled for eight H200s: collectives, their bytes, and memory; nothing is run.

`pytest -s` prints the figures that docs/multi-gpu.md gives.
"""

import dataclasses
import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fsa_jax
from compile.programs import LLAMA_LAYER, QWEN3_8B
from fsa_jax.bench.ahead_of_time import OPTIONS, compile_for, config_of, mesh_of, operator_gradients
from fsa_jax.bench.shapes import Shape
from fsa_jax.losses import CHUNK_SIZE
from fsa_jax.training.mesh import AXES, Placement
from fsa_jax.training.step import abstract_model, init_state, make_train_step, state_shardings

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("empty_kernels")]
DEVICES = 8
#: Sizes of data, tensor and sequence, and the sequences of a batch.
QWEN3_MESHES = [(8, 1, 1, 8), (1, 8, 1, 1), (1, 4, 2, 1)]
WIDTHS = {"width": 128, "value_width": 128, "block_size": 64, "slots": 16}
#: Matches a collective with its types; asynchronous ones list operands before results.
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("
)
BYTES = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4}


def compile_on(mesh, spec, run, shapes):
    """Compiles for a mesh of H200s, splitting batch, tokens and heads by `spec`."""
    shapes = [
        jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec[: min(len(x.shape), 3)]))
        )
        if len(x.shape) == 4
        else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec[:2])))
        for x in shapes
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        return jax.jit(run).trace(*shapes).lower().compile(OPTIONS)


def peak(compiled):
    found = compiled.memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes


def collectives(compiled):
    """Returns the kind and the result arrays (dtype, shape) of each collective in a program."""
    found = []
    for types, kind, start in COLLECTIVE.findall(compiled.as_text()):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
        shapes = [(dtype, tuple(map(int, shape.split(",")))) for dtype, shape in arrays]
        # Asynchronous collectives list operands, then results.
        found.append((kind, shapes[len(shapes) // 2 :] if start else shapes))
    return found


def over_sequence(shape):
    """Returns the operator over a sequence axis, with gradients, and its argument shapes."""
    config = config_of(shape)
    _, *shapes = operator_gradients(shape, packed=True)

    def run(*arrays):
        *arrays, dout, ids = arrays
        attend = functools.partial(
            fsa_jax.native_sparse_attention,
            config=config, segment_ids=ids, sequence_axis="sequence",
        )  # fmt: skip
        out, pull = jax.vjp(attend, *arrays)
        return out, pull(dout)

    return run, shapes


@pytest.mark.essential_cases("True")
@pytest.mark.parametrize("packed", [False, True])
def test_rows_and_heads_need_no_collective(packed):
    shape = Shape(batch=4, length=4096, heads=8, kv_heads=2, **WIDTHS)
    run, *shapes = operator_gradients(shape, packed=packed)
    mesh = mesh_of("H200", (4, 2), ("data", "tensor"))
    compiled = compile_on(mesh, P("data", None, "tensor"), run, shapes)
    assert collectives(compiled) == []
    assert "triton" in str(compiled.as_text())


def test_a_sharding_that_is_left_to_xla_gathers():
    """Checks that the measure detects collectives."""

    def run(x):
        return jax.lax.sort(x, dimension=0)

    mesh = mesh_of("H200", (8,), ("data",))
    shape = jax.ShapeDtypeStruct((64, 8, 8, 8), jnp.float32)
    assert collectives(compile_on(mesh, P("data"), run, [shape])) != []


def test_a_row_over_eight_devices_gathers_keys_and_scatters_their_gradients():
    """Bytes of each kind match docs/multi-gpu.md; with one KV head, no loop hides any of them."""
    length, width, stride = 65536, 128, 16
    run, shapes = over_sequence(Shape(length=length, heads=4, kv_heads=1, **WIDTHS))
    compiled = compile_on(mesh_of("H200", (8,), ("sequence",)), P(None, "sequence"), run, shapes)
    sizes = {"all-gather": 0, "reduce-scatter": 0}
    ids = 0
    for kind, arrays in collectives(compiled):
        for dtype, shape in arrays:
            bytes_ = BYTES[dtype] * math.prod(shape)
            if dtype == "s32":
                ids += bytes_
            else:
                sizes[kind] += bytes_  # KeyError for an unexpected kind
    keys_and_values = 2 * (length + length // stride) * width
    # With one head, XLA finds that the backward pass repeats the gathers of the forward pass.
    gathered, scattered = 2 * keys_and_values, 4 * keys_and_values
    print(
        f"gathered {sizes['all-gather']}, scattered {DEVICES * sizes['reduce-scatter']}, ids {ids}"
    )
    assert sizes["all-gather"] == gathered
    assert DEVICES * sizes["reduce-scatter"] == scattered
    assert ids in (4 * length, 2 * 4 * length)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (32, 8)])
def test_memory_of_a_million_tokens(heads, kv_heads):
    shape = Shape(length=2**20, heads=heads, kv_heads=kv_heads, **WIDTHS)
    run, *shapes = operator_gradients(shape, packed=True)
    one = peak(compile_for("H200", run, *shapes))
    run, shapes = over_sequence(shape)
    mesh = mesh_of("H200", (8,), ("sequence",))
    each = peak(compile_on(mesh, P(None, "sequence"), run, shapes))
    print(
        f"{heads} over {kv_heads} heads: {one / 2**30:.1f} GiB on one, {each / 2**30:.1f} on eight"
    )
    assert each <= one / (6 if kv_heads == 2 else 9)


@pytest.mark.parametrize(
    ("data", "tensor", "sequence", "rows"),
    [(1, 1, 1, 1), (8, 1, 1, 8), (1, 8, 1, 1), (1, 1, 8, 1), (1, 2, 4, 1)],
)
def test_memory_of_a_training_step(data, tensor, sequence, rows):
    """Compiles a Llama 3 8B decoder layer on sequences of 131,072 tokens, with fsdp parameters."""
    config = dataclasses.replace(LLAMA_LAYER, batch_size=rows)
    used, _ = training_step(config, (data, tensor, sequence))
    print(f"data={data} tensor={tensor} sequence={sequence}: {used / 2**30:.1f} GiB a device")
    assert used < 40 * 2**30


@pytest.mark.parametrize(("data", "tensor", "sequence", "rows"), QWEN3_MESHES)
def test_memory_of_qwen3_8b(data, tensor, sequence, rows):
    """A training step of all 36 layers on sequences of 32,768 tokens, with fsdp parameters.

    The logits of one sequence would take 18.5 GiB. No array is that of more tokens than a chunk by
    the vocabulary.
    """
    config = dataclasses.replace(LLAMA_LAYER, batch_size=rows, seq_len=32768)
    # The trainer's own vocabulary is smaller; a step does not depend on that.
    object.__setattr__(config, "model", QWEN3_8B)
    # Merged pairs of matmuls and those in Triton would need a GPU for autotuning.
    apart = {"xla_gpu_dot_merger_threshold_mb": 0, "xla_gpu_enable_triton_gemm": False}
    used, text = training_step(config, (data, tensor, sequence), apart)
    print(f"data={data} tensor={tensor} sequence={sequence}: {used / 2**30:.1f} GiB a device")
    vocabulary = QWEN3_8B.vocab_size
    shapes = re.findall(rf"\w+\[(\d+(?:,\d+)*),{vocabulary}\]", text)
    tokens = [math.prod(map(int, x.split(","))) for x in shapes]
    assert max(x for x in tokens if x != QWEN3_8B.embed_dim) == CHUNK_SIZE
    assert used < 110 * 2**30


def training_step(config, sizes, options=None):
    """Compiles a training step for a mesh of H200s; returns the bytes of a device, and the text."""
    mesh = mesh_of("H200", sizes, AXES)
    placement = Placement(mesh, fsdp=True)
    graphdef, params = abstract_model(placement.model(config.model))
    state = jax.eval_shape(functools.partial(init_state, config=config), params)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_shardings(config, placement),
    )
    shape = (config.batch_size, config.seq_len)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement.batch)
    step = make_train_step(graphdef, config, placement)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        compiled = step.trace(state, ids, ids).lower().compile(OPTIONS | (options or {}))
    found = compiled.memory_analysis()
    text = compiled.as_text()
    assert found is not None
    assert text is not None
    return peak(compiled) - found.alias_size_in_bytes, text
