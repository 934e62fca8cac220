"""`fsa-jax convert`, and models as runs of the trainer."""

import dataclasses
import io
import sys
from typing import Any

import numpy as np
import pytest
from flax import nnx

from fsa_jax import NSAConfig
from fsa_jax.cli import main
from fsa_jax.pretrained import load_pretrained, save_pretrained
from fsa_jax.training import PRESETS, TrainConfig, convert, load_model
from fsa_jax.training.config import FREE_ON_RESUME
from fsa_jax.transformer import Transformer, TransformerConfig
from pretrained.folders import LLAMA, config_of, params_of, same, tensors_of

BYTES = TransformerConfig(
    vocab_size=257, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, attention="full"
)
SIZES = [
    "--kernel-size",
    "16",
    "--kernel-stride",
    "8",
    "--block-size",
    "16",
    "--topk",
    "4",
    "--window-size",
    "32",
]


def test_sparse_attention_starts(tmp_path, capsys):
    out = tmp_path / "sparse"
    words = ["convert", str(LLAMA), str(out), "--attention", "nsa", "--gates", "open", *SIZES]
    assert main(words) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    sizes = NSAConfig(kernel_size=16, kernel_stride=8, block_size=16, topk=4)
    want = load_pretrained(LLAMA, attention="nsa", nsa=sizes, gates="open")
    same(load_pretrained(out), want)
    assert (out / "tokenizer.json").exists()
    assert config_of(out)["eos_token_id"] == 2


def test_dtypes_and_hybrids(tmp_path):
    out = tmp_path / "half"
    words = ["convert", str(LLAMA), str(out), "--layer-types", "full", "nsa"]
    assert main([*words, "--param-dtype", "bfloat16", "--max-shard-size", "100KB"]) == 0
    assert {str(x.dtype) for x in tensors_of(out).values()} == {"bfloat16"}
    assert load_pretrained(out).config.types == ("full", "nsa")
    assert len(list(out.glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent", "out"], "source must be a folder"),
        ([".", "out"], "source must be a folder with a config.json"),
        ([str(LLAMA), str(LLAMA)], "target must not hold files"),
        ([str(LLAMA), str(LLAMA)], "replace the model in it, or target to another folder"),
        ([str(LLAMA), "out", "--topk", "4"], "nsa must be None for a dense model"),
        ([str(LLAMA), "out", "--topk=16"], "nsa must be None for a dense model"),
        ([str(LLAMA), "out", "--to", "run"], "got to='run' and vocab_size=512"),
        ([str(LLAMA), "out", "--to", "run", "--max-shard-size", "5GB"], "with to='safetensors'"),
        ([str(LLAMA), "out", "--text", "a"], "text must only be given with to='run', got ('a',)"),
        ([str(LLAMA), "out", "--steps", "3"], "steps must only be given with to='run', got 3"),
        ([str(LLAMA), "out", "--to", "run", "--seq-len", "1"], "seq_len must be an integer of at"),
        ([str(LLAMA)], "TARGET"),
    ],
)
def test_errors(tmp_path, monkeypatch, capfd, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *words]) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    with convert._bar("loading") as show:
        show(1, 4)
        show(4, 4)
    assert "loading: 100%" in sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "4/4" in sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
@pytest.mark.essential
def test_runs(tmp_path, capsys):
    """A model goes from safetensors to a run, and from there to sparse safetensors."""
    model = Transformer(BYTES, rngs=nnx.Rngs(0))
    files, run, sparse = (tmp_path / name for name in ("files", "run", "sparse"))
    save_pretrained(model, files)
    assert main(["convert", str(files), str(run), "--to", "run"]) == 0
    loaded, config = load_model(run)
    same(loaded, model)
    assert config.model == BYTES
    assert main(["sample", "--checkpoint", str(run), "--max-bytes", "4"]) == 0
    assert main(["convert", str(files), str(run), "--to", "run"]) == 2
    assert "out must not hold a run already" in capsys.readouterr().err
    assert main(["convert", str(files), str(run), "--to", "run", "--overwrite"]) == 0
    assert main(["convert", str(run), str(sparse), "--attention", "nsa", *SIZES]) == 0
    started = load_pretrained(sparse)
    assert started.config.attention == "nsa"
    for name, tensor in tensors_of(files).items():
        np.testing.assert_array_equal(tensors_of(sparse)[name], tensor)
    assert {path.name for path in tmp_path.iterdir()} == {"files", "run", "sparse"}


def test_sizes_that_equal_the_defaults(tmp_path, capfd):
    """Sizes on the command line are checked against those of the source whatever they are."""
    sparse = tmp_path / "sparse"
    words = ["convert", str(LLAMA), str(sparse), "--attention", "nsa", *SIZES]
    assert main(words) == 0
    assert main(["convert", str(sparse), str(tmp_path / "same")]) == 0
    assert main(["convert", str(sparse), str(tmp_path / "out"), "--topk", "16"]) == 2
    assert "nsa must be None" in capfd.readouterr().err


def test_the_settings_of_a_run():
    """They are fields of a run, most of which it keeps when it is resumed."""
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    settings: dict[str, Any] = {
        field.name: field.type for field in dataclasses.fields(convert.RunSettings)
    }
    assert settings.keys() <= fields.keys() - FREE_ON_RESUME - {"model"} | {"text", "steps"}
    assert all(kind in (fields[name], fields[name] | None) for name, kind in settings.items())
    saved = dataclasses.replace(PRESETS["tiny"], decay_steps=600, resume=True, distributed=True)
    like = convert._settings_like
    again = dataclasses.replace(saved, resume=False, distributed=False)
    assert like(saved, convert.RunSettings()) == again
    wanted = convert.RunSettings(steps=700, warmup_steps=0)
    assert like(saved, wanted).last_decay_step == 700
    assert like(saved, wanted).warmup_steps == 0
    wanted = convert.RunSettings(steps=700, decay_steps=500)
    assert like(saved, wanted).last_decay_step == 500


@pytest.mark.slow
def test_runs_keep_their_tokenizer(tmp_path):
    """A run on the tokens of a folder becomes a folder with the same tokenizer."""
    (tmp_path / "text.txt").write_text("some words, and some more words. " * 200)
    words = f"--init {LLAMA} --text {tmp_path} --steps 1 --warmup-steps 0 --seq-len 32"
    words += f" --batch-size 1 --eval-sequences 1 --out {tmp_path / 'run'}"
    assert main(["train", *words.split()]) == 0
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "files")]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        kept = (tmp_path / "run" / name).read_bytes()
        assert (tmp_path / "files" / name).read_bytes() == kept


@pytest.mark.slow
def test_runs_go_on(tmp_path, capsys):
    """A run that was written continues with the command that is printed, and so does its copy."""
    (tmp_path / "a.txt").write_text("the quick brown fox. " * 40)
    files, run, sparse = (tmp_path / name for name in ("files", "run", "sparse"))
    save_pretrained(Transformer(BYTES, rngs=nnx.Rngs(0)), files)
    words = f"--text {tmp_path / 'a.txt'} --steps 1 --seq-len 32 --batch-size 2 --eval-sequences 2"
    assert main(["convert", str(files), str(run), "--to", "run", *words.split()]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("train it with: fsa-jax ")
    assert main(command.split()) == 0
    assert "step 1: validation loss" in capsys.readouterr().out

    changed = ["--attention", "nsa", "--gates", "open", *SIZES, "--warmup-steps", "0"]
    assert main(["convert", str(run), str(sparse), "--to", "run", *changed]) == 0
    _, before = load_model(run)
    model, after = load_model(sparse)
    assert after.model.attention == "nsa"
    want = {"out": sparse, "resume": False, "warmup_steps": 0, "model": after.model}
    assert after == dataclasses.replace(before, **want)
    assert main(["train", "--resume", "--out", str(sparse)]) == 0
    trained, _ = load_model(sparse)
    gates = [path for path in params_of(model) if "gate" in path]
    assert gates
    for path in gates:
        assert not np.array_equal(params_of(model)[path], params_of(trained)[path]), path


@pytest.mark.slow
def test_what_files_do_not_hold(tmp_path):
    """A run keeps the dtype, the dropout and the remat of the run that it was made of."""
    (tmp_path / "a.txt").write_text("the quick brown fox. " * 40)
    kept = {"dtype": "bfloat16", "dropout_rate": 0.1, "remat": True}
    model = dataclasses.replace(BYTES, **kept)
    settings = dataclasses.replace(PRESETS["tiny"], text=(tmp_path / "a.txt",), model=model)
    first, second = tmp_path / "first", tmp_path / "second"
    convert.write_run(Transformer(model, rngs=nnx.Rngs(0)), settings, first)
    assert main(["convert", str(first), str(second), "--to", "run"]) == 0
    assert load_model(second)[1].model == model


@pytest.mark.slow
def test_a_run_is_replaced_only_by_another(tmp_path, capfd):
    files, run = tmp_path / "files", tmp_path / "run"
    save_pretrained(Transformer(BYTES, rngs=nnx.Rngs(0)), files)
    words = ["convert", str(files), str(run), "--to", "run"]
    assert main(words) == 0
    assert main([*words, "--overwrite", "--text", str(tmp_path / "absent")]) == 2
    assert "text must be files or folders that exist" in capfd.readouterr().err
    same(load_model(run)[0], Transformer(BYTES, rngs=nnx.Rngs(0)))
