"""The command `sample`: streaming of generated text, and errors in its arguments."""

import io
import shutil
import sys

import numpy as np
import pytest
from command_line import one_line
from flax import nnx

import fsa_jax
from fsa_jax import cli
from fsa_jax.cli import main
from fsa_jax.transformer import Transformer, TransformerConfig


def test_sample_continues_the_prompt(trained, capfd):
    words = ["sample", "--checkpoint", str(trained), "--max-bytes", "12", "--prompt", "the é"]
    assert main([*words, "--seed", "5"]) == 0
    first = capfd.readouterr()
    assert first.out.startswith("the é")
    assert first.err == ""
    assert main([*words, "--seed", "5"]) == 0
    assert capfd.readouterr().out == first.out
    assert main([*words, "--seed", "6"]) == 0
    assert capfd.readouterr().out != first.out


def test_sample_without_prompt(trained, capfd):
    assert main(["sample", "--checkpoint", str(trained), "--max-bytes", "12"]) == 0
    # There are twelve bytes; those that are not valid UTF-8 are shown as one character.
    assert 1 <= len(capfd.readouterr().out.removesuffix("\n")) <= 12


def test_sample_shows_bytes_as_they_come_until_the_stop(trained, monkeypatch, capfd):
    """A character of several bytes is shown only when its last byte arrives."""
    added = "é\n€\n\nmore".encode()
    asked, seen = [], []

    def generate(model, prompts, *, stream, stop, **options):
        asked.append((prompts, stop, options))
        for byte in added[: added.index(stop) + len(stop)]:
            stream(np.asarray([byte], np.int32))
            sys.stdout.flush()
            seen.append(capfd.readouterr().out)

    monkeypatch.setattr(fsa_jax, "generate", generate)
    words = ["--prompt", "é", "--stop", "\n\n", "--top-p", "0.5", "--max-bytes", "99"]
    assert main(["sample", "--checkpoint", str(trained), *words]) == 0
    assert seen == ["é", "é", "\n", "", "", "€", "\n", "\n"]
    assert capfd.readouterr().out == "\n"
    options = {"max_tokens": 99, "temperature": 0.8, "top_p": 0.5, "seed": 0, "vocab_size": 256}
    assert asked == [([[256, *"é".encode()]], b"\n\n", options)]


def test_sample_shows_bytes_that_are_no_text(trained, monkeypatch, capfd):
    def generate(model, prompts, *, stream, **options):
        for byte in b"a\xff\xe2\x82":
            stream(np.asarray([byte], np.int32))

    monkeypatch.setattr(fsa_jax, "generate", generate)
    assert main(["sample", "--checkpoint", str(trained), "--prompt", "b"]) == 0
    assert capfd.readouterr().out == "ba\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\n"


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_sample(monkeypatch):
    asked = []

    class Closed(io.StringIO):
        def write(self, text):
            asked.append(text)
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    model = Transformer(TransformerConfig(num_layers=1, embed_dim=8), rngs=nnx.Rngs(0))
    with pytest.raises(BrokenPipeError):
        fsa_jax.generate(
            model, [b"a"], max_tokens=50, vocab_size=256, stream=cli._TextPrinter(b"a").add
        )
    assert len(asked) == 1
    assert asked[0].startswith("a")


def test_ctrl_c_ends_a_sample_with_one_line(trained, monkeypatch, capfd):
    def generate(model, prompts, *, stream, **options):
        for byte in b"bc":
            stream(np.asarray([byte], np.int32))
        raise KeyboardInterrupt

    monkeypatch.setattr(fsa_jax, "generate", generate)
    assert main(["sample", "--checkpoint", str(trained), "--prompt", "a"]) == 130
    assert capfd.readouterr() == ("abc\n", "fsa-jax: error: interrupted\n")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--temperature", "-1", "temperature must be at least 0 and finite, got -1.0"),
        ("--top-p", "0", "top_p must be above 0 and at most 1, got 0.0"),
        ("--max-bytes", "0", "max_bytes must be an integer of at least 1, got 0"),
        ("--seed", "-3", "seed must be an integer of at least 0, got -3"),
    ],
)
def test_bad_sampling_flag(trained, capfd, flag, value, message):
    assert main(["sample", "--checkpoint", str(trained), "--prompt", "a", flag, value]) == 2
    assert message in one_line(capfd)


def test_unreadable_checkpoint(trained, tmp_path, capfd):
    run = shutil.copytree(trained, tmp_path / "run")
    for file in (run / "checkpoints" / "2" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert main(["sample", "--checkpoint", str(run)]) == 2
    assert "checkpoint must be readable by this version and complete, got" in one_line(capfd)
