"""Sources of text as tokens: records, pre-tokenised data, the cache, and mixtures."""

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from fsa_jax.training import text as text_module
from fsa_jax.training.corpus import Corpus, TokenCorpus
from fsa_jax.training.data import (
    TrainingBatches,
    load_corpus,
    open_corpus,
    target_bytes,
    unigram_loss,
    validation_batches,
)
from fsa_jax.training.documents import Mixture, TokenDocuments, Turns
from fsa_jax.training.token_files import read_tokens, write_tokens
from fsa_jax.training.tokenizer import load_tokenizer

LLAMA = load_tokenizer(str(Path(__file__).parents[1] / "data" / "hf" / "llama3"))
BYTES = load_tokenizer("bytes")
TEXTS = [f"{i} bottles of béer on the wall. " * (1 + i % 4) for i in range(50)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Returns the folder that the cache has, apart from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fsa-jax" / "tokens"


def text_folder(folder: Path, texts=TEXTS) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return folder


def json_lines(file: Path, texts=TEXTS, column="text") -> Path:
    lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "wt") as opened:
        opened.write(lines)
    return file


def documents_of(documents) -> list[list[int]]:
    assert isinstance(documents, TokenDocuments)
    lengths = np.diff(documents.ends, prepend=0).tolist()
    return [documents.part(i, 0, length).tolist() for i, length in enumerate(lengths)]


def take(batches: TrainingBatches, count: int) -> list[np.ndarray]:
    return [np.stack([x.tokens, x.segment_ids]) for x in (next(batches) for _ in range(count))]


def batches_of(corpus: Corpus | TokenCorpus, **changes) -> TrainingBatches:
    options: dict[str, Any] = {"seq_len": 16, "batch_size": 3, "seed": 0} | changes
    return TrainingBatches(corpus.train, **options)


def assert_same_corpus(got: Corpus | TokenCorpus, wanted: Corpus | TokenCorpus) -> None:
    assert got.fingerprint == wanted.fingerprint
    assert got.sizes() == wanted.sizes()
    np.testing.assert_array_equal(take(batches_of(got), 12), take(batches_of(wanted), 12))
    options = {"seq_len": 16, "batch_size": 2, "num_sequences": 9}
    one, two = (validation_batches(x.validation, **options) for x in (got, wanted))
    np.testing.assert_array_equal([x.tokens for x in one], [x.tokens for x in two])
    counts = [x.unigram_counts() for x in (got, wanted)]
    np.testing.assert_array_equal(counts[0], counts[1])
    losses = [unigram_loss(x.train, one, x.unigram_counts()) for x in (got, wanted)]
    assert losses[0] == losses[1]


def test_documents_begin_and_end(tmp_path):
    corpus = open_corpus([text_folder(tmp_path / "texts")], tokenizer=LLAMA)
    found = documents_of(corpus.train) + documents_of(corpus.validation)
    wanted = [[0, *LLAMA.encode([text.encode()])[0].tolist(), 1] for text in TEXTS]
    assert sorted(found) == sorted(wanted)
    # The order and the split are those of bytes.
    of_bytes = load_corpus([tmp_path / "texts"])
    encoded = LLAMA.encode(of_bytes.validation)
    assert documents_of(corpus.validation) == [[0, *x.tolist(), 1] for x in encoded]
    sizes = corpus.sizes()
    assert sizes["val_bytes"] == sum(map(len, of_bytes.validation))
    assert sizes["train_bytes"] == sum(map(len, of_bytes.train))
    assert sizes["train_tokens"] == sum(map(len, documents_of(corpus.train)))


def test_a_single_document_is_cut(tmp_path):
    (file := tmp_path / "book.txt").write_text(TEXTS[3])
    corpus = open_corpus([file], tokenizer=LLAMA)
    (tokens,) = LLAMA.encode([TEXTS[3].encode()])
    cut = len(tokens) - max(1, len(tokens) // 20)
    assert documents_of(corpus.train) == [[0, *tokens[:cut].tolist()]]
    assert documents_of(corpus.validation) == [[0, *tokens[cut:].tolist(), 1]]


@pytest.mark.parametrize("count", [1, 2, 50])
def test_bytes_in_files_give_the_batches_of_bytes_in_memory(count, tmp_path, monkeypatch):
    folder = text_folder(tmp_path / "texts", [*TEXTS[:count], TEXTS[0]])
    in_memory = open_corpus([folder], tokenizer=BYTES)
    monkeypatch.setattr(text_module, "_IN_MEMORY", 0)
    in_files = open_corpus([folder], tokenizer=BYTES)
    assert isinstance(in_memory, Corpus)
    assert isinstance(in_files, TokenCorpus)
    assert_same_corpus(in_files, in_memory)
    assert in_files.skipped == in_memory.skipped == {"copies of others": 1}


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA], ids=["bytes", "file"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_records_are_documents(kind, tokenizer, tmp_path):
    plain = open_corpus([text_folder(tmp_path / "texts")], tokenizer=tokenizer)
    (folder := tmp_path / "records").mkdir()
    for i, texts in enumerate([TEXTS[:7], TEXTS[7:], ["", TEXTS[1]]]):
        if kind == "parquet":
            table = pyarrow.table({"id": list(range(len(texts))), "body": texts})
            parquet.write_table(table, folder / f"{i}.parquet", row_group_size=5)
        else:
            json_lines(folder / f"{i}.{kind}", texts, "body")
    corpus = open_corpus([folder], tokenizer=tokenizer, column="body")
    assert_same_corpus(corpus, plain)
    assert corpus.read == {f".{kind}": 3}
    assert corpus.skipped == {"empty": 1, "copies of others": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: must be a JSON object, got b'{\"text\""),
        ('\n["text"]\n', r"a\.jsonl, line 2: must be a JSON object, got b'\[\"text\"\]"),
        (
            '{"text": "a"}\n{"body": "a", "id": 1}\n',
            r"line 2: text_column must be a column, got 'text' \(columns: 'body', 'id'\)",
        ),
        ('{"text": null}', r"a\.jsonl, line 1: 'text' must be text, got NoneType"),
        ('{"text": "\\ud800"}', r"a\.jsonl, line 1: 'text' must be valid Unicode"),
        ("", r"text must hold at least two tokens, got fewer in .*a\.jsonl; skipped: none"),
        ('{"text": ""}', r"text must hold at least two tokens, got .*skipped: 1 empty"),
    ],
)
def test_bad_lines(content, message, tmp_path, cache):
    (file := tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_corpus([file], tokenizer=LLAMA)
    assert not [child for child in cache.iterdir() if child.is_dir()]


def test_bad_records(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1], "n": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: text_column .* \(columns: 'id', 'n'\)"):
        open_corpus([tmp_path / "a.parquet"], tokenizer=LLAMA)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: 'id' must be text, got int"):
        open_corpus([tmp_path / "a.parquet"], tokenizer=LLAMA, column="id")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"text must be readable, got '.*b\.parquet' after row 0"):
        open_corpus([tmp_path / "b.parquet"], tokenizer=LLAMA)
    whole = json_lines(tmp_path / "c.jsonl.gz").read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"text must be readable, got '.*c\.jsonl\.gz', line \d+"):
        open_corpus([tmp_path / "c.jsonl.gz"], tokenizer=LLAMA)
    (tmp_path / "c.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"readable, got '.*c\.jsonl\.gz', line 1: Not a gzip"):
        open_corpus([tmp_path / "c.jsonl.gz"], tokenizer=LLAMA)


def test_text_that_is_not_utf8(tmp_path):
    folder = text_folder(tmp_path / "texts")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    assert open_corpus([folder], tokenizer=LLAMA).skipped == {"not UTF-8 .txt": 1}
    with pytest.raises(ValueError, match=r"latin\.txt: text must be UTF-8 for this tokenizer"):
        open_corpus([folder / "latin.txt", folder], tokenizer=LLAMA)


# Pre-tokenised data


def test_pre_tokenised_data(tmp_path):
    texts = open_corpus([text_folder(tmp_path / "texts")], tokenizer=LLAMA)
    documents = documents_of(texts.train) + documents_of(texts.validation)
    written = write_tokens(
        tmp_path / "tokens",
        [[], *documents, documents[0]],
        vocab_size=LLAMA.vocab_size,
        tokenizer=LLAMA.fingerprint,
    )
    corpus = open_corpus([written], tokenizer=LLAMA)
    assert corpus.skipped == {"empty": 1, "copies of others": 1}
    found = documents_of(corpus.train) + documents_of(corpus.validation)
    assert sorted(found) == sorted(documents)
    assert isinstance(corpus.train, TokenDocuments)
    assert isinstance(corpus.train.tokens, np.memmap)
    with pytest.raises(ValueError, match=r"tokenizer must be the one that wrote '.*tokens'"):
        open_corpus([written], tokenizer=BYTES)
    # Records of another format are copied.
    record = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for document in [[], *documents, documents[0]]:
        record.write(np.asarray(document, "<u4").tobytes())
    record.close()
    of_records = open_corpus([tmp_path / "a.array_record"], tokenizer=LLAMA)
    assert_same_corpus(of_records, corpus)
    assert of_records.skipped == corpus.skipped
    # Without offsets, documents are cut at their begin tokens.
    flat = np.concatenate(documents).astype(np.int32)
    np.save(tmp_path / "flat.npy", flat)
    assert_same_corpus(open_corpus([tmp_path / "flat.npy"], tokenizer=LLAMA), corpus)
    assert read_tokens(tmp_path / "flat.npy", end=1).offsets.tolist() == (
        read_tokens(tmp_path / "flat.npy", begin=0).offsets.tolist()
    )
    assert read_tokens(tmp_path / "flat.npy").offsets.tolist() == [0, len(flat)]


def test_a_single_document_of_tokens_is_cut(tmp_path):
    np.save(tmp_path / "flat.npy", np.arange(2, 102, dtype=np.uint16))
    corpus = open_corpus([tmp_path / "flat.npy"], tokenizer=LLAMA)
    assert documents_of(corpus.train) == [list(range(2, 97))]
    assert documents_of(corpus.validation) == [list(range(97, 102))]


def test_many_tokens_are_counted_in_parts(monkeypatch):
    monkeypatch.setattr("fsa_jax.training.documents._COUNTED", 7)
    tokens = np.random.default_rng(0).integers(0, 5, 100)
    documents = TokenDocuments(tokens, np.asarray([50, 3, 20]), np.asarray([30, 40, 41]), 6)
    used = np.concatenate([tokens[50:80], tokens[3:13], tokens[20:21]])
    assert documents.counts().tolist() == np.bincount(used, minlength=6).tolist()


def test_bad_tokens(tmp_path):
    with pytest.raises(ValueError, match=r"documents\[1\] must hold tokens in 0 \.\. 3, got 4"):
        write_tokens(tmp_path / "new", [[1], [2, 4]], vocab_size=4)
    with pytest.raises(ValueError, match=r"documents\[0\] must be a sequence of integers, got fl"):
        write_tokens(tmp_path / "new", [np.asarray([1.5])], vocab_size=4)
    assert not list(tmp_path.iterdir())
    folder = write_tokens(tmp_path / "new", [[1, 600], [2]], vocab_size=1000)
    with pytest.raises(ValueError, match="folder must not exist yet"):
        write_tokens(folder, [], vocab_size=4)
    with pytest.raises(ValueError, match=r"new, document 0, must hold tokens in 0 \.\. 509, got 6"):
        open_corpus([folder], tokenizer=LLAMA)
    np.save(folder / "offsets.npy", [0, 2, 4])
    with pytest.raises(ValueError, match=r"offsets\.npy must hold integers that never fall, from"):
        open_corpus([folder], tokenizer=LLAMA)
    (folder / "tokens.json").write_text('{"what": "else"}')
    np.save(folder / "offsets.npy", [0, 2, 3])
    with pytest.raises(ValueError, match=r"tokens\.json must describe fsa-jax tokens of version 1"):
        open_corpus([folder], tokenizer=LLAMA)
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"a\.npy must hold integers of shape \[tokens\], got fl"):
        open_corpus([tmp_path / "a.npy"], tokenizer=LLAMA)
    (tmp_path / "a.npy").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"text must be readable, got '.*a\.npy'"):
        open_corpus([tmp_path / "a.npy"], tokenizer=LLAMA)
    (tmp_path / "a.array_record").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"text must be readable, got '.*a\.array_record'"):
        open_corpus([tmp_path / "a.array_record"], tokenizer=LLAMA)
    record = ArrayRecordWriter(str(tmp_path / "b.array_record"), "group_size:1")
    record.write(b"short")
    record.close()
    with pytest.raises(ValueError, match=r"record 0, must hold integers of 32 bits, got 5 bytes"):
        open_corpus([tmp_path / "b.array_record"], tokenizer=LLAMA)
    with pytest.raises(ValueError, match="text must be pre-tokenised data alone, or with text_w"):
        open_corpus([tmp_path / "a.npy", tmp_path / "new"], tokenizer=LLAMA)


# The cache


def test_text_is_tokenised_once(tmp_path, cache, capfd):
    file = json_lines(tmp_path / "a.jsonl")
    first = open_corpus([file], tokenizer=LLAMA)
    assert "fsa-jax: tokenising 1 files of " in capfd.readouterr().err
    moved = shutil.move(file, tmp_path / "b.jsonl")
    again = open_corpus([Path(moved)], tokenizer=LLAMA)
    assert capfd.readouterr().err == ""
    assert_same_corpus(again, first)
    assert isinstance(again.train, TokenDocuments)
    assert isinstance(again.train.tokens, np.memmap)
    assert len([child for child in cache.iterdir() if child.is_dir()]) == 1
    # Other text, another column or another tokenizer is something else.
    json_lines(tmp_path / "b.jsonl", TEXTS[1:])
    assert open_corpus([tmp_path / "b.jsonl"], tokenizer=LLAMA).fingerprint != first.fingerprint
    open_corpus([tmp_path / "b.jsonl"], tokenizer=BYTES)
    assert len([child for child in cache.iterdir() if child.is_dir()]) == 3


@pytest.mark.parametrize("name", ["tokens.npy", "starts.npy", "counts.npy", "index.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_cache_is_written_again(name, damage, tmp_path, cache, capfd):
    file = json_lines(tmp_path / "a.jsonl")
    first = open_corpus([file], tokenizer=LLAMA)
    (damaged,) = cache.glob(f"*/{name}")
    content = bytearray(damaged.read_bytes())
    damaged.unlink()  # the first corpus maps the old file
    if damage == "cut":
        damaged.write_bytes(content[:-5])
    elif damage == "flip":
        content[-3] ^= 1
        damaged.write_bytes(content)
    capfd.readouterr()
    assert_same_corpus(open_corpus([file], tokenizer=LLAMA), first)
    assert "is damaged and is written again" in capfd.readouterr().err


# Mixtures


@pytest.mark.parametrize("weights", [[3, 1], [1], [0.1, 0.7, 0.2], [1e-3, 5, 2, 2]])
def test_turns_are_in_proportion_and_leave_nothing_out(weights):
    turns, count = Turns(weights), 4000
    taken = [turns[i] for i in range(count)]
    for source, weight in enumerate(weights):
        own = [index for which, index in taken if which == source]
        assert own == list(range(len(own)))
        assert len(own) == pytest.approx(count * weight / sum(weights), abs=len(weights))
    assert turns[10**15][1] == pytest.approx(10**15 * weights[turns[10**15][0]] / sum(weights))


def mixture(tmp_path, weights, tokenizer=LLAMA):
    one = json_lines(tmp_path / "one.jsonl")
    two = text_folder(tmp_path / "two", [text.upper() for text in TEXTS[:20]])
    return open_corpus([one, two], tokenizer=tokenizer, weights=weights)


def test_a_mixture_has_sequences_of_each_source_in_proportion(tmp_path):
    corpus = mixture(tmp_path, (3, 1), BYTES)
    assert isinstance(corpus.train, Mixture)
    rows = np.concatenate([batch[0] for batch in take(batches_of(corpus, seq_len=64), 40)])
    kinds = Counter()
    for row in rows:
        text = bytes(token for token in row.tolist() if token < 256)
        assert text.isupper() != text.islower()
        kinds["two" if text.isupper() else "one"] += 1
    assert kinds == {"one": 90, "two": 30}
    # One process of two reads half of each batch.
    whole = take(batches_of(corpus, batch_size=4), 8)
    parts = [take(batches_of(corpus, batch_size=4, sequences=x), 8) for x in ((0, 2), (2, 4))]
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis=2))


def test_a_mixture_is_resumed_bitwise(tmp_path):
    corpus = mixture(tmp_path, (0.3, 0.7))
    straight = batches_of(corpus)
    take(straight, 5)
    state = json.loads(json.dumps(straight.get_state()))
    resumed = batches_of(corpus)
    resumed.set_state(state)
    np.testing.assert_array_equal(take(straight, 60), take(resumed, 60))


def test_validation_of_a_mixture(tmp_path):
    corpus = mixture(tmp_path, (1, 1))
    batches = validation_batches(corpus.validation, seq_len=8, batch_size=2, num_sequences=4)
    assert len(batches) == 2
    assert target_bytes(batches, LLAMA.num_bytes) > 0
    loss = unigram_loss(corpus.train, batches, corpus.unigram_counts())
    # A mixture of two equal parts loses at most log 2 against either.
    assert isinstance(corpus.train, Mixture)
    for source in corpus.train.sources:
        assert loss <= unigram_loss(source, batches) + np.log(2)


def test_a_mixture_trains_on_nothing_that_another_source_holds_out(tmp_path):
    one = json_lines(tmp_path / "one.jsonl", TEXTS)
    # The second source holds out what the first one trains on.
    trained = [text.decode() for text in load_corpus([one]).train]
    two = json_lines(tmp_path / "two.jsonl", [*trained, "something else"])
    corpus = open_corpus([one, two], tokenizer=LLAMA, weights=(1, 1))
    assert isinstance(corpus, TokenCorpus)
    assert isinstance(corpus.train, Mixture)
    assert isinstance(corpus.validation, Mixture)
    train, held_out = (
        [set(map(tuple, documents_of(source))) for source in part.sources]
        for part in (corpus.train, corpus.validation)
    )
    assert not held_out[0] & held_out[1]
    assert not (train[0] | train[1]) & (held_out[0] | held_out[1])
    assert corpus.sizes()["train_documents"] == sum(map(len, train)) == 48 - 2 + 49 - 2
    for counts, source in zip(corpus.counts, corpus.train.sources, strict=True):
        assert counts.tolist() == source.counts().tolist()
    (single := tmp_path / "a.txt").write_text(TEXTS[0])
    with pytest.raises(ValueError, match="text must be different for each of text_weights"):
        open_corpus([single, single], tokenizer=LLAMA, weights=(1, 1))
