"""`fsa-jax convert`, and models as runs of the trainer."""

import dataclasses
import io
import sys

import numpy as np
import pytest
from flax import nnx

from fsa_jax import NSAConfig
from fsa_jax.cli import main
from fsa_jax.pretrained import load_pretrained, save_pretrained
from fsa_jax.training import convert, load_model, train
from fsa_jax.transformer import Transformer, TransformerConfig
from pretrained.folders import LLAMA, config_of, same, tensors_of

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
        ([".", "out"], "path must be a folder with a config.json"),
        ([str(LLAMA), str(LLAMA)], "path must not hold files"),
        ([str(LLAMA), "out", "--topk", "4"], "nsa must be None for a dense model"),
        ([str(LLAMA), "out", "--to", "run"], "vocab_size must be 257"),
        ([str(LLAMA)], "PATH"),
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


@pytest.mark.slow
def test_runs_go_on(tmp_path):
    """A run that was written continues with the optimiser of a first step."""
    (tmp_path / "a.txt").write_text("the quick brown fox. " * 40)
    run = tmp_path / "run"
    convert.write_run(Transformer(BYTES, rngs=nnx.Rngs(0)), run, text=(tmp_path / "a.txt",))
    _, config = load_model(run)
    result = train(dataclasses.replace(config, resume=True, steps=1, out=run))
    assert result.step == 1
    assert np.isfinite(result.val_loss)
