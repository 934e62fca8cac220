"""Runs on the tokens of a tokenizer.json: what they write, how they resume, and samples of them."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from util import assert_same_bits

import fsa_jax
from fsa_jax.cli import main
from fsa_jax.training import Checkpoints, read_metrics, train
from fsa_jax.training.checkpoint import RunPosition
from fsa_jax.training.config import check_resumable, config_from_json, config_to_json
from fsa_jax.training.data import open_corpus, target_bytes, validation_batches
from fsa_jax.training.step import init_state
from fsa_jax.training.tokenizer import keep_tokenizer, load_tokenizer, tokenizer_of_run
from training.runs import DENSE, abstract_like, saved_state, tiny, without_times

LLAMA = Path(__file__).parents[1] / "data" / "hf" / "llama3"
MODEL = dataclasses.replace(DENSE, vocab_size=512, num_layers=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory, texts):
    """Returns a folder with the tokenizer, records, and a run on both sources at step 0."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(LLAMA, folder / "tokenizer")
    lines = [json.dumps({"body": f"café {i} of {i % 7} " * 5}) + "\n" for i in range(40)]
    (folder / "records.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        config = run_config(folder, texts, folder / "run")
        (folder / "run").mkdir()
        keep_tokenizer(folder / "run", load_tokenizer(config.tokenizer))
        corpus = open_texts(config)
        # The parameters are zeros, which need no compilation.
        with Checkpoints(folder / "run", create=True) as checkpoints:
            state = init_state(abstract_like(config), config)
            position = RunPosition(config, corpus.fingerprint, {"batches": 0})
            checkpoints.save(0, state, position)
        yield folder


def open_texts(config):
    return open_corpus(
        config.text,
        tokenizer=load_tokenizer(config.tokenizer),
        column=config.text_column,
        weights=config.text_weights,
    )


def run_config(home: Path, texts: Path, out: Path, **changes):
    return tiny(
        texts,
        out,
        **{
            "text": (home / "records.jsonl", texts),
            "text_column": "body",
            "text_weights": (3, 1),
            "tokenizer": str(home / "tokenizer"),
            "model": MODEL,
        }
        | changes,
    )


@pytest.mark.slow
@pytest.mark.essential
def test_a_run_on_tokens_is_resumed_bitwise(home, texts, tmp_path):
    straight = run_config(home, texts, tmp_path / "straight")
    train(straight)
    config = run_config(home, texts, tmp_path / "run")
    train(dataclasses.replace(config, steps=3))
    # The original may be gone: the run has a copy.
    copy = str(tmp_path / "run" / "tokenizer.json")
    result = train(dataclasses.replace(config, resume=True, tokenizer=copy))
    assert_same_bits(saved_state(straight, 6)[0], saved_state(config, 6)[0])
    wanted, got = (
        without_times(read_metrics(x.run_folder / "metrics.jsonl")) for x in (straight, config)
    )
    assert [row for row in got if row["step"] != 3 or "loss" in row] == wanted
    assert result.val_loss == wanted[-1]["val_loss"]
    assert result.val_bits_per_byte == pytest.approx(wanted[-1]["val_bits_per_byte"])
    assert result.unit == "token"
    assert config.run_folder / "tokenizer.json" in result.files

    row, tokenizer = wanted[-1], load_tokenizer(config.tokenizer)
    batches = validation_batches(
        open_texts(config).validation, seq_len=32, batch_size=2, num_sequences=3
    )
    assert row["val_bytes"] == target_bytes(batches, tokenizer.num_bytes) > row["val_tokens"]
    bits = row["val_loss"] * row["val_tokens"] / row["val_bytes"] / math.log(2)
    assert row["val_bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    described = json.loads((config.run_folder / "run.json").read_text())
    assert described["data"]["train_tokens"] > 0
    assert described["result"]["val_bits_per_byte"] == row["val_bits_per_byte"]
    assert 0 < described["unigram_loss"] < math.log(512)
    assert tokenizer_of_run(config.run_folder, copy).fingerprint == tokenizer.fingerprint


def test_a_run_resumes_only_with_its_tokenizer_and_text(home, texts, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    config = run_config(home, texts, run, resume=True)
    other = shutil.copytree(home / "tokenizer", tmp_path / "other")
    (other / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    with pytest.raises(ValueError, match=r"tokenizer must be that of the checkpoint, got another"):
        train(dataclasses.replace(config, tokenizer=str(other)))
    model = dataclasses.replace(MODEL, vocab_size=257)
    with pytest.raises(ValueError, match=r"resume must keep the settings .* vocab_size=257"):
        train(dataclasses.replace(config, tokenizer="bytes", model=model))
    with pytest.raises(ValueError, match=r"text_weights=\[1.0, 1.0\] \(checkpoint: \[3.0, 1.0\]"):
        train(dataclasses.replace(config, text_weights=(1, 1)))
    (records := tmp_path / "records.jsonl").write_text('{"body": "a"}\n{"body": "some text"}\n')
    with pytest.raises(ValueError, match=r"text must be the text of the checkpoint"):
        train(dataclasses.replace(config, text=(records, texts)))


def test_the_vocabulary_of_the_model_is_large_enough(home, texts, tmp_path):
    model = dataclasses.replace(MODEL, vocab_size=509)
    with pytest.raises(ValueError, match=r"vocab_size must be at least the 510 of tokenizer .* 50"):
        train(run_config(home, texts, tmp_path / "run", model=model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": ""}, "tokenizer must be a text that is not empty, got ''"),
        ({"text_column": ""}, "text_column must be a text that is not empty, got ''"),
        ({"text_weights": (1,)}, "text_weights must be one for each text, got 1 for 2"),
        ({"text_weights": (1, 0)}, "text_weights must be positive and finite, got 0"),
    ],
)
def test_bad_settings(changes, message, home, texts):
    with pytest.raises(ValueError, match=message):
        run_config(home, texts, Path("out"), **changes)


def test_a_run_of_before_has_bytes(texts):
    """Descriptions and checkpoints that do not name a tokenizer are those of bytes."""
    config = tiny(texts, Path("out"))
    values = config_to_json(config)
    for name in ("tokenizer", "text_column", "text_weights"):
        del values[name]
    assert config_from_json(values) == config
    check_resumable(config_from_json(values), config)


def test_the_flag_gives_the_model_its_vocabulary(home, configs, capfd):
    words = ["train", "--tokenizer", str(home / "tokenizer")]
    assert main(words) == 0
    assert configs[-1].model.vocab_size == 510
    assert main([*words, "--vocab-size", "600"]) == 0
    assert configs[-1].model.vocab_size == 600
    assert configs[-1].tokenizer == str(home / "tokenizer")
    capfd.readouterr()
    assert main(["train", "--tokenizer", "nope"]) == 2
    assert "tokenizer must be bytes, a tokenizer.json or a folder" in capfd.readouterr().err


# Samples


@pytest.fixture
def generated(monkeypatch):
    """Lets `generate` give the tokens in a list, and returns the list and its arguments."""
    tokens, asked = [], []

    def generate(model, prompts, *, stream, **options):
        asked.append((prompts, options))
        for token in tokens[: options["max_tokens"]]:
            stream([token])

    monkeypatch.setattr(fsa_jax, "generate", generate)
    return tokens, asked


def encode(text: str) -> list[int]:
    return load_tokenizer(str(LLAMA)).encode([text.encode()])[0].tolist()


def sample(run: Path, *words: str) -> int:
    return main(["sample", "--checkpoint", str(run), *words])


def test_a_sample_is_decoded_until_the_end_token(home, generated, capfd):
    tokens, asked = generated
    tokens += [*encode(" naïve 東京"), 1, *encode("never shown")]
    assert sample(home / "run", "--prompt", "café", "--top-p", "0.5") == 0
    assert capfd.readouterr().out == "café naïve 東京\n"
    options = {"max_tokens": 256, "temperature": 0.8, "top_p": 0.5, "seed": 0}
    options |= {"stop": b"", "vocab_size": 510}
    assert asked == [([[0, *encode("café")]], options)]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--stop", "ef\n"], "abc def\n"),
        (["--stop", "zzz"], "abc def\n\nghi 東"),
        (["--max-tokens", "1"], "a"),
        (["--max-bytes", "6"], "abc de"),
    ],
)
def test_where_a_sample_ends(words, shown, home, generated, capfd):
    generated[0].extend(token for letter in "abc def\n\nghi 東" for token in encode(letter))
    assert sample(home / "run", *words) == 0
    assert capfd.readouterr().out == shown + "\n"


def test_bad_prompts(home, tmp_path, capfd):
    run = shutil.copytree(home / "run", tmp_path / "run")
    (run / "tokenizer_config.json").write_text('{"bos_token": null}')
    assert sample(run) == 2
    assert "prompt must not be empty: the tokenizer has no begin token" in capfd.readouterr().err
    assert sample(run, "--prompt", "a\udcff") == 2
    assert r"prompt must be UTF-8, got b'a\xff'" in capfd.readouterr().err


@pytest.mark.slow
def test_a_sample_needs_only_the_run(home, tmp_path, capfd):
    run = shutil.copytree(home / "run", tmp_path / "run")
    assert sample(run, "--prompt", "café", "--max-tokens", "5") == 0
    first = capfd.readouterr().out
    assert first.startswith("café")
    (run / "tokenizer.json").unlink()
    assert sample(run, "--prompt", "café") == 2
    assert "tokenizer must be bytes, a tokenizer.json or a folder" in capfd.readouterr().err
