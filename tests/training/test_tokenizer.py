"""Tokenizers: begin and end tokens, bytes of tokens, whole characters, and copies in runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fsa_jax.training.tokenizer import keep_tokenizer, load_tokenizer, tokenizer_of_run

LLAMA = Path(__file__).parents[1] / "data" / "hf" / "llama3"


def load(folder: Path, **files: dict):
    """Loads the tokenizer in a copy of the folder with other settings."""
    shutil.copy(LLAMA / "tokenizer.json", folder / "tokenizer.json")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(str(folder))


def byte_fallback(folder: Path) -> Path:
    """Writes a tokenizer like those of SentencePiece: marked spaces, bytes for what is unknown."""
    names = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcé", "▁a", "bc"]
    model = tokenizers.models.BPE(
        {name: i for i, name in enumerate(names)},
        [("▁", "a"), ("b", "c")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    made.add_special_tokens(["<s>"])
    made.save(str(folder / "fallback.json"))
    return folder / "fallback.json"


def test_expected_encodings_and_decodings():
    tokenizer = load_tokenizer(str(LLAMA))
    assert tokenizer.vocab_size == 510
    for case in json.loads((LLAMA / "encodings.json").read_text()):
        (tokens,) = tokenizer.encode([case["text"].encode()])
        assert tokens.tolist() == case["ids"]
        stream = tokenizer.stream([])
        assert "".join(map(stream.add, case["ids"])) + stream.finish() == case["text"]
        assert tokenizer.num_bytes[tokens].sum() == len(case["text"].encode())


def test_tokenizer_config_decides_on_begin_and_end():
    """The ids of config.json are those of other tokens in this vocabulary."""
    tokenizer = load_tokenizer(str(LLAMA / "tokenizer.json"))
    assert (tokenizer.begin, tokenizer.end, tokenizer.stops) == (0, 1, (1,))
    assert tokenizer.num_bytes[[0, 1]].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("files", "begin", "end", "stops"),
    [
        ({}, None, None, ()),
        ({"config": {"bos_token_id": 5, "eos_token_id": [7, 8]}}, 5, 7, (7, 8)),
        ({"config": {"bos_token_id": 5}, "generation_config": {"bos_token_id": 6}}, 6, None, ()),
        (
            {
                "tokenizer_config": {"bos_token": None, "eos_token": {"content": "<|end|>"}},
                "generation_config": {"bos_token_id": 5, "eos_token_id": [9, 1]},
            },
            None,
            1,
            (1, 9),
        ),
        ({"tokenizer_config": {"bos_token": "<|end|>", "add_bos_token": False}}, None, None, ()),
    ],
)
def test_begin_end_and_stops(files, begin, end, stops, tmp_path):
    tokenizer = load(tmp_path, **files)
    assert (tokenizer.begin, tokenizer.end, tokenizer.stops) == (begin, end, stops)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": {"eos_token_id": 510}}, "eos_token_id must be below the 510 tokens .* got 510"),
        ({"tokenizer_config": {"bos_token": "<s>"}}, "bos_token must be a token of .* got '<s>'"),
        ({"tokenizer_config": []}, "tokenizer_config.json' must hold a JSON object, got list"),
    ],
)
def test_bad_settings(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **files)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer must be bytes, a tokenizer.json or .* 'nope'"):
        load_tokenizer("nope")
    with pytest.raises(ValueError, match=r"tokenizer must be bytes.*tokenizer\.json': No such"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer must be a tokenizer.json of Hugging Face"):
        load_tokenizer(str(tmp_path))
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "w.json"))
    with pytest.raises(ValueError, match="tokenizer must give back the spaces of a text"):
        load_tokenizer(str(tmp_path / "w.json"))


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(alphabet="aé東🙂 \ufffd\n", max_size=8),
    text=st.text(alphabet="abé東🙂 \ufffd\n", max_size=30),
)
def test_only_whole_characters_are_decoded(prompt, text):
    tokenizer = load_tokenizer(str(LLAMA))
    before, tokens = tokenizer.encode([prompt.encode(), text.encode()])
    stream = tokenizer.stream(before.tolist())
    parts = [stream.add(token) for token in tokens.tolist()]
    # Whatever has been shown stays right: it is the start of the text.
    for count in range(len(parts) + 1):
        assert text.startswith("".join(parts[:count]))
    assert "".join(parts) + stream.finish() == text


def test_bytes_that_are_no_text_are_shown_when_nothing_can_complete_them():
    tokenizer = load_tokenizer(str(LLAMA))
    first, *_, last = tokenizer.encode(["東".encode()])[0].tolist()
    (letter,) = tokenizer.encode([b"a"])[0].tolist()
    stream = tokenizer.stream([])
    assert stream.add(first) == ""
    assert stream.add(letter) == "\N{REPLACEMENT CHARACTER}a"
    assert stream.add(last) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_tokenizer_with_bytes_for_what_is_unknown(tmp_path):
    tokenizer = load_tokenizer(str(byte_fallback(tmp_path)))
    text = "a abc é 東 c"
    (tokens,) = tokenizer.encode([text.encode()])
    assert tokenizer.num_bytes[tokens].sum() == len(text.encode())
    stream = tokenizer.stream([])
    parts = [stream.add(token) for token in tokens.tolist()]
    assert "".join(parts) + stream.finish() == text
    assert "東" in parts


def test_limits_in_the_file_do_not_apply(tmp_path):
    described = json.loads((LLAMA / "tokenizer.json").read_text())
    described["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    assert len(load_tokenizer(str(tmp_path)).encode([b"import os, sys"])[0]) == 9


def test_the_copy_in_a_run_is_the_same_tokenizer(tmp_path):
    original = load(
        tmp_path,
        tokenizer_config={"bos_token": None, "eos_token": "<|end|>"},
        generation_config={"eos_token_id": [1, 9]},
    )
    run = tmp_path / "run"
    run.mkdir()
    keep_tokenizer(run, original)
    assert {file.name for file in run.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    copy = tokenizer_of_run(run, "somewhere/else")
    assert copy.fingerprint == original.fingerprint
    assert (copy.begin, copy.end, copy.stops) == (None, 1, (1, 9))
    assert (run / "tokenizer.json").read_bytes() == (LLAMA / "tokenizer.json").read_bytes()


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer is tokenizer_of_run(Path("unused"), "bytes")
    assert (tokenizer.begin, tokenizer.end, tokenizer.vocab_size) == (256, None, 257)
    assert tokenizer.encode([b"a\xff"])[0].tolist() == [97, 255]
    assert np.flatnonzero(tokenizer.num_bytes != 1).tolist() == [256]
    stream = tokenizer.stream([])
    assert [stream.add(byte) for byte in "é".encode()] == ["", "é"]
