"""Loading to a mesh: each device reads its own part."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from fsa_jax import NSAConfig
from fsa_jax.partitioning import sharding_rules
from fsa_jax.pretrained import load_pretrained, names, save_pretrained
from fsa_jax.training.mesh import Placement
from fsa_jax.transformer import Transformer, TransformerConfig
from pretrained.folders import DATA, LLAMA, params_of, same

SIZES = NSAConfig(kernel_size=16, kernel_stride=8, block_size=16, topk=4, window_size=32)


def mesh_of(**axes):
    types = (AxisType.Auto,) * len(axes)
    devices = jax.devices()[: int(np.prod([*axes.values()]))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


@pytest.fixture
def parts(monkeypatch):
    """The sizes of the parts of layers that are read, by tensor shape."""
    sizes: dict[tuple[int, ...], set[int]] = {}
    read = names.Place.read

    def spy(place, tensor, index):
        part = read(place, tensor, index)
        sizes.setdefault(place.tensor_shape, set()).add(part.size)
        return part

    monkeypatch.setattr(names.Place, "read", spy)
    return sizes


def test_each_device_reads_its_part(parts, tmp_path):
    mesh = mesh_of(data=2, tensor=2, sequence=2)
    model = load_pretrained(LLAMA, mesh=mesh, attention="nsa", nsa=SIZES)
    assert parts[128, 64] == {128 * 64 // 4}  # q_proj
    assert parts[96, 64] == {96 * 64 // 4}  # gate_proj and up_proj
    assert parts[64, 128] == {64 * 128 // 4}  # o_proj
    assert parts[512, 64] == {512 * 64}  # embedding and head
    wanted = Placement(mesh, fsdp=True).params(model.config)
    for path, leaf in params_of(model).items():
        sharding = wanted
        for key in path:
            sharding = sharding[key]
        assert leaf.sharding == sharding, path
    same(model, load_pretrained(LLAMA, attention="nsa", nsa=SIZES))
    with jax.set_mesh(mesh):  # the axes of parameters have other names than those of the mesh
        same(load_pretrained(LLAMA, mesh=mesh, attention="nsa", nsa=SIZES), model)
    save_pretrained(model, tmp_path / "out")
    same(load_pretrained(tmp_path / "out"), model)


def test_rules_of_the_caller():
    mesh = mesh_of(model=4)
    with pytest.raises(ValueError, match="mesh must have an axis data or tensor where no sharding"):
        load_pretrained(LLAMA, mesh=mesh)
    with sharding_rules(head_dim="model", vocab="model"):
        model = load_pretrained(LLAMA, mesh=mesh)
    assert params_of(model)["head",].sharding.spec == PartitionSpec("model", None)
    assert params_of(model)[
        "layers", "attention", "query", "kernel"
    ].sharding.spec == PartitionSpec(
        *(None, None, None),
        "model",
    )
    same(model, load_pretrained(LLAMA))


def test_parameters_that_do_not_divide():
    with pytest.raises(
        ValueError, match=r"layers.attention.key.kernel must divide over the mesh axis tensor of 4"
    ):
        load_pretrained(DATA / "qwen3", mesh=mesh_of(tensor=4))


PEAK = """
import re, sys
from pathlib import Path
import jax
from fsa_jax.pretrained import load_pretrained
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
jax.block_until_ready(jax.numpy.ones(8) + 1)
before = peak()
model = load_pretrained(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
def test_weights_are_never_on_the_host_twice(tmp_path):
    """On a CPU the loaded weights are in the host's memory themselves; hence between 1 and 2."""
    config = TransformerConfig(
        attention="full", num_layers=8, embed_dim=1024, num_heads=8, num_kv_heads=8, mlp_dim=2048
    )
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert size > 3e8
    save_pretrained(model, tmp_path / "x")
    output = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert 0.9 * size < int(output) < 1.9 * size
