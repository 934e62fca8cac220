"""Runs that start from a model of Hugging Face or from another run."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import one_line
from flax import nnx
from util import assert_same_bits

from fsa_jax.cli import main
from fsa_jax.pretrained import load_pretrained, save_pretrained
from fsa_jax.training import TrainConfig, load_model, read_metrics, train
from fsa_jax.training.config import config_from_json, config_to_json
from fsa_jax.training.data import TrainingBatches
from fsa_jax.training.folder import write_description
from fsa_jax.training.mesh import Placement
from fsa_jax.training.start import check_start, initial_params, open_text, with_init
from fsa_jax.training.step import make_eval_step, state_shardings
from training.runs import DENSE, NSA, saved_state, tiny, without_times

LLAMA = Path(__file__).parents[1] / "data" / "hf" / "llama3"
SPARSE = {"attention": "nsa", "nsa": NSA}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keeps the caches of tokens in the folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def start(texts: Path, out: Path, init: Path, model=None, **changes) -> TrainConfig:
    """Returns a run from a folder, with other fields of the model, and without dropout."""
    config = with_init(tiny(texts, out, **changes), init)
    changed = dataclasses.replace(config.model, dropout_rate=0.0, **model or {})
    return dataclasses.replace(config, model=changed)


def first_loss(config: TrainConfig) -> float:
    return read_metrics(config.run_folder / "metrics.jsonl")[0]["loss"]


def loss_of(model, config: TrainConfig) -> float:
    """Returns the mean loss of a model on the first batch of a run."""
    batch = next(
        TrainingBatches(
            open_text(config).train,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
        )
    )
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    total, count = make_eval_step(graphdef)(params, batch.tokens, batch.segment_ids)
    return float(total) / int(count)


def params_of(config: TrainConfig, mesh: str = "", *, fsdp: bool = False):
    """Returns the first parameters of a run, and their shardings."""
    placement = Placement.build(mesh, fsdp=fsdp)
    check_start(config, placement)
    shardings = state_shardings(config, placement).params
    return initial_params(config, placement.model(config.model), shardings), shardings


@pytest.mark.slow
@pytest.mark.essential
def test_a_run_starts_from_a_folder_and_resumes_without_it(texts, tmp_path):
    init = shutil.copytree(LLAMA, tmp_path / "llama")
    straight = start(texts, tmp_path / "straight", init)
    train(straight)
    expected = loss_of(load_pretrained(LLAMA), straight)
    assert first_loss(straight) == pytest.approx(expected, rel=1e-6)
    described = json.loads((straight.run_folder / "run.json").read_text())["config"]
    assert described["init"] == str(init)

    config = dataclasses.replace(straight, out=tmp_path / "run")
    train(dataclasses.replace(config, steps=3))
    shutil.rmtree(init)
    resumed = dataclasses.replace(config, resume=True, tokenizer=str(config.run_folder))
    other = dataclasses.replace(resumed, init=None)
    with pytest.raises(ValueError, match=r"init=None \(checkpoint: '.*llama'\)"):
        train(other)
    train(resumed)
    assert_same_bits(saved_state(straight, 6)[0], saved_state(config, 6)[0])
    rows, wanted = (
        without_times(read_metrics(x.run_folder / "metrics.jsonl")) for x in (config, straight)
    )
    assert [row for row in rows if row["step"] != 3 or "loss" in row] == wanted


@pytest.mark.slow
def test_sparse_attention_starts_from_a_dense_folder(texts, tmp_path):
    config = start(texts, tmp_path / "run", LLAMA, SPARSE, steps=1)
    train(config)
    model = load_pretrained(LLAMA, attention="nsa", nsa=NSA, gates="open")
    assert first_loss(config) == pytest.approx(loss_of(model, config), rel=1e-6)
    assert load_model(config.run_folder)[0].config.gate_bias


@pytest.mark.slow
@pytest.mark.essential
@pytest.mark.parametrize(
    "types",
    [{}, SPARSE, {"layer_types": ("full", "nsa"), "nsa": NSA}],
    ids=["dense", "sparse", "hybrid"],
)
def test_a_run_starts_from_another(types, texts, dense, tmp_path):
    """Also as sparse attention, or as a hybrid, from a dense one."""
    config = start(texts, tmp_path / "run", dense, types, steps=1)
    train(config)
    if types:
        save_pretrained(load_model(dense)[0], tmp_path / "model")
        options = {"layer_types": config.model.types, "nsa": NSA, "gates": "open"}
        model = load_pretrained(tmp_path / "model", **options)
    else:
        model, _ = load_model(dense)
    assert first_loss(config) == pytest.approx(loss_of(model, config), rel=1e-6)
    assert not list(tmp_path.glob(".run.*"))


@pytest.mark.slow
def test_sparse_attention_goes_on(texts, straight, tmp_path):
    """Sizes that no parameter depends on may be others."""
    nsa = dataclasses.replace(NSA, topk=4, window_size=9)
    params, _ = params_of(start(texts, tmp_path / "run", straight, {"nsa": nsa}))
    expected = nnx.to_pure_dict(nnx.state(load_model(straight)[0]))
    assert_same_bits(params, expected)
    nsa = dataclasses.replace(NSA, kernel_size=8, block_size=8)
    with pytest.raises(ValueError, match=r"nsa must keep the shapes .*positions has the shape"):
        params_of(start(texts, tmp_path / "run", straight, {"nsa": nsa}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh", "fsdp"),
    [("run", "data=2", True), ("folder", "data=2,tensor=2", False), ("started", "data=2", True)],
    ids=["run", "folder", "started"],
)
def test_parameters_are_loaded_on_the_mesh(kind, mesh, fsdp, texts, dense, tmp_path):
    """They are split as those of the run, and have its dtype."""
    init = dense if kind == "run" else LLAMA
    model = {"param_dtype": "bfloat16"} | (SPARSE if kind == "started" else {})
    config = start(texts, tmp_path / "run", init, model, fsdp=fsdp)
    whole = params_of(config)[0]
    params, shardings = params_of(config, mesh, fsdp=fsdp)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert_same_bits(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, whole))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_layers": 3}, r"model must be that of init='.*llama3', got num_layers=3 \(init: 2\)"),
        (
            {"rope_theta": 1e4, "tie_embeddings": True},
            r"got rope_theta=10000.0 \(init: 500000.0\), tie_embeddings=True \(init: False\)",
        ),
        (SPARSE | {"gate_bias": False}, r"got gate_bias=False \(init: True\)"),
        (SPARSE | {"compression": "mean"}, r"got compression='mean' \(init: 'linear'\)"),
    ],
)
def test_the_model_is_that_of_the_folder(model, message, texts, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(start(texts, tmp_path / "run", LLAMA, model))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sparse_run_does_not_become_dense(texts, straight, tmp_path):
    with pytest.raises(ValueError, match=r"got attention='full' \(init: 'nsa'\)"):
        train(start(texts, tmp_path / "run", straight, {"attention": "full"}))


def test_bad_folders(texts, run, tmp_path):
    config = tiny(texts, tmp_path / "new")
    (empty := tmp_path / "empty").mkdir()
    for init, message in (
        (tmp_path / "none", "init must be the folder of a model or of a run, got '.*none'"),
        (empty, "init must be the folder of a model or of a run: path must be a folder with a"),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, init=init))
    with pytest.raises(ValueError, match=r"init must be a pathlib.Path or None, got 'a'"):
        dataclasses.replace(config, init="a")
    with pytest.raises(ValueError, match=r"init must be another folder than out, got '.*run'"):
        train(dataclasses.replace(config, init=run, out=run, overwrite=True))
    assert load_model(run)[1].model == DENSE


def test_a_run_of_before_started_at_random(texts):
    values = config_to_json(config := tiny(texts, Path("out"), init=Path("folder")))
    assert config_from_json(values) == config
    del values["init"]
    assert config_from_json(values).init is None


# The command line


def test_the_folder_gives_the_defaults(configs, dense, tmp_path, capfd):
    words = ["train", "--init", str(LLAMA)]
    assert main(words) == 0
    assert main([*words, "--attention", "nsa", "--topk", "5", "--preset", "small"]) == 0
    plain, sparse = configs
    assert (plain.init, plain.tokenizer) == (LLAMA, str(LLAMA))
    model = plain.model
    assert (model.vocab_size, model.embed_dim, model.attention) == (512, 64, "full")
    assert (sparse.model.attention, sparse.model.nsa.topk) == ("nsa", 5)
    assert (sparse.model.dtype, sparse.model.param_dtype) == ("bfloat16", "float32")
    for config in configs:
        check_start(dataclasses.replace(config, out=tmp_path / "run"), Placement.build(""))

    # The settings of another run are kept where the folder has none, as is its attention.
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"config": config_to_json(sparse)}))
    assert main(["train", "--config", str(file), "--init", str(dense)]) == 0
    expected = (sparse.model.nsa, "nsa", DENSE.embed_dim, "bytes")
    model = configs[-1].model
    assert (model.nsa, model.attention, model.embed_dim, configs[-1].tokenizer) == expected

    bare = shutil.copytree(LLAMA, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    capfd.readouterr()
    assert main(["train", "--init", str(bare)]) == 2
    assert "tokenizer must be given where init has no tokenizer.json" in one_line(capfd)
    assert main(["train", "--init", str(bare), "--tokenizer", str(LLAMA)]) == 0


def test_the_command_resumes_after_the_folder_is_gone(configs, texts, tmp_path):
    out = tmp_path / "run"
    words = ["train", "--init", str(tmp_path / "gone"), "--out", str(out), "--resume"]
    assert main(words) == 2
    out.mkdir()
    config = start(texts, out, LLAMA)
    write_description(out, {"config": config_to_json(config)})
    shutil.copy(LLAMA / "tokenizer.json", out)
    (out / "checkpoints" / "3").mkdir(parents=True)
    (out / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    assert main(words) == 0
    assert configs[-1].model == config.model
    assert (configs[-1].tokenizer, configs[-1].init) == (str(out), tmp_path / "gone")
