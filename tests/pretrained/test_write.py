"""Saving: what is written, where, and what an interrupted save leaves behind."""

import dataclasses
import json
import os
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from fsa_jax import NSAConfig
from fsa_jax.pretrained import load_pretrained, save_pretrained, write
from fsa_jax.transformer import Transformer, TransformerConfig
from pretrained.folders import DATA, LLAMA, changed, config_of, params_of, same, tensors_of

SMALL = TransformerConfig(
    vocab_size=11, num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=6
)


@pytest.fixture(scope="module")
def llama():
    return load_pretrained(LLAMA)


@pytest.mark.fast_cases("llama3")
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_files_of_dense_models_are_those_that_were_loaded(tmp_path, name):
    source, target = DATA / name, tmp_path / "out"
    save_pretrained(load_pretrained(source), target, like=source)
    old, new = tensors_of(source), tensors_of(target)
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        assert (tensor.dtype, tensor.tobytes()) == (new[key].dtype, new[key].tobytes())
    assert config_of(target)["model_type"] == name.removesuffix("3" * (name == "llama3"))
    if name == "llama3":  # one file: the same bytes, with the header of the library
        assert (target / "model.safetensors").read_bytes() == (
            (source / "model.safetensors").read_bytes()
        )
        assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_dtypes_are_kept(tmp_path):
    def mixed(tensors):
        return {k: x if "norm" in k else x.astype(jnp.bfloat16) for k, x in tensors.items()}

    source = changed(tmp_path / "in", change=mixed)
    save_pretrained(load_pretrained(source), tmp_path / "out")
    file = "model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"


def test_shards(tmp_path, llama):
    target = tmp_path / "out"
    save_pretrained(llama, target, max_shard_size="140KB")
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert files == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, 1 + len(files))
    ]
    assert len(files) > 2
    for file in files:
        assert (target / file).stat().st_size < 140_000 + 4096  # and a header
    index = json.loads((target / "model.safetensors.index.json").read_text())
    tensors = tensors_of(LLAMA)
    assert index["metadata"] == {
        "total_size": sum(x.nbytes for x in tensors.values()),
        "total_parameters": sum(x.size for x in tensors.values()),
    }
    assert index["weight_map"].keys() == tensors.keys()
    same(load_pretrained(target), llama)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "mlp", "gate": "token", "gate_bias": True, "kv_per_branch": True},
        {"compression": "weighted", "qk_norm": True, "qkv_bias": True, "tie_embeddings": False},
        {"layer_types": ("window", "nsa"), "mlp_bias": True, "out_bias": True},
    ],
    ids=["mlp", "weighted", "hybrid"],
)
def test_sparse_models_load_again(tmp_path, options):
    config = dataclasses.replace(SMALL, **options)
    model = Transformer(config, rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    assert again.config == config
    same(again, model)
    assert config_of(tmp_path / "out")["model_type"] == "fsa_jax"
    with pytest.raises(ValueError, match="attention must be None or that of a folder whose layers"):
        load_pretrained(tmp_path / "out", attention="full")
    with pytest.raises(ValueError, match="nsa must be None or that of the folder"):
        load_pretrained(tmp_path / "out", nsa=NSAConfig(topk=5))
    same(load_pretrained(tmp_path / "out", layer_types=list(config.types)), model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fsa_jax", {}, "must be an object with the fields of the attention"),
        ("fsa_jax", {"attention": "nsa", "rope_theta": 3}, "must not have the field 'rope_theta'"),
        ("fsa_jax", {"attention": "nsa", "dtype": "bfloat16"}, "must not have the field 'dtype'"),
        ("fsa_jax", {"attention": "nsa", "layer_types": 5}, "layer_types must have one type"),
        ("base_model_type", ["x"], "base_model_type must be one of"),
    ],
)
def test_damaged_configurations_of_sparse_models(tmp_path, key, value, message):
    save_pretrained(Transformer(SMALL, rngs=nnx.Rngs(0)), tmp_path / "out")
    values = config_of(tmp_path / "out") | {key: value}
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "out")


def test_dense_models_keep_the_id_of_padding(tmp_path):
    config = dataclasses.replace(SMALL, attention="full", padding_id=-1)
    save_pretrained(Transformer(config, rngs=nnx.Rngs(0)), tmp_path / "out")
    assert load_pretrained(tmp_path / "out").config.padding_id == -1


def test_paths_are_those_that_they_lead_to(tmp_path):
    (tmp_path / "a").mkdir()
    save_pretrained(Transformer(SMALL, rngs=nnx.Rngs(0)), tmp_path / "a" / ".." / "b")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "b"]


def test_nothing_is_replaced_by_accident(tmp_path):
    model = Transformer(SMALL, rngs=nnx.Rngs(0))
    target = tmp_path / "out"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="path must be a folder or not exist"):
        save_pretrained(model, tmp_path / "file", overwrite=True)
    target.mkdir()  # an empty folder holds nothing
    save_pretrained(model, target)
    with pytest.raises(
        ValueError, match=r"path must not hold files, .*'config.json': set overwrite"
    ):
        save_pretrained(model, target)
    (target / "notes.txt").write_text("mine")
    save_pretrained(
        Transformer(SMALL, rngs=nnx.Rngs(1)), target, overwrite=True, max_shard_size=400
    )
    held = {path.name for path in target.iterdir()}
    assert "notes.txt" in held
    assert "model.safetensors" not in held  # the old weights do not shadow the new ones
    same(load_pretrained(target), Transformer(SMALL, rngs=nnx.Rngs(1)))
    (target / "config.json").unlink()
    with pytest.raises(ValueError, match=r"overwrite must replace only .*there is no config.json"):
        save_pretrained(model, target, overwrite=True)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("held", [False, True])
def test_interrupted_saves_leave_nothing(tmp_path, monkeypatch, held):
    model, target = Transformer(SMALL, rngs=nnx.Rngs(0)), tmp_path / "out"
    if held:
        save_pretrained(model, target)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    fetch, left = write._Tensor.fetch, [5]

    def interrupted(tensor):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return fetch(tensor)

    monkeypatch.setattr(write._Tensor, "fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(Transformer(SMALL, rngs=nnx.Rngs(1)), target, overwrite=held)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    if held:
        same(load_pretrained(target), model)


def test_a_model_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    model, target = Transformer(SMALL, rngs=nnx.Rngs(0)), tmp_path / "out"
    save_pretrained(model, target)
    rename = Path.rename

    def failing(source, to):
        if source.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return rename(source, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(Transformer(SMALL, rngs=nnx.Rngs(1)), target, overwrite=True)
    same(load_pretrained(target), model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_have_the_usual_modes(tmp_path):
    old = os.umask(0o027)
    try:
        save_pretrained(Transformer(SMALL, rngs=nnx.Rngs(0)), tmp_path / "out")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o777 == 0o640


def test_wrong_arguments(tmp_path, llama):
    with pytest.raises(
        ValueError, match="max_shard_size must be like '5GB' or a number of bytes, got 'big'"
    ):
        save_pretrained(llama, tmp_path / "x", max_shard_size="big")
    with pytest.raises(ValueError, match="max_shard_size must be an integer"):
        save_pretrained(llama, tmp_path / "x", max_shard_size=0)
    with pytest.raises(ValueError, match="model must be a Transformer, got dict"):
        save_pretrained(params_of(llama), tmp_path / "x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"like must be a folder with a config.json"):
        save_pretrained(llama, tmp_path / "x", like=tmp_path)
    assert not list(tmp_path.iterdir())
    assert write._bytes_of("1.5 gb") == 1_500_000_000
