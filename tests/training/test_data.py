"""Training data: reading, splitting, packing, and resuming at a saved position."""

import itertools
import json
import math
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsa_jax.training.config import DOCUMENT_START
from fsa_jax.training.data import (
    Batch,
    PackedSequences,
    TrainingBatches,
    example_sequence,
    load_corpus,
    unigram_loss,
    validation_batches,
)


def counting_document(first: int, length: int) -> bytes:
    """Returns bytes that increase by one, so that a cut or a mix within a segment is visible."""
    return bytes((first + i) % 256 for i in range(length))


def one_epoch(documents, seq_len):
    rows = PackedSequences(documents, seq_len=seq_len)
    parts = [rows[i] for i in range(len(rows))]
    return tuple(np.stack([part[name] for part in parts]) for name in ("tokens", "segment_ids"))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8), seq_len=st.integers(2, 20))
def test_packing_keeps_every_byte_in_order(lengths, seq_len):
    documents = [counting_document(37 * i, length) for i, length in enumerate(lengths)]
    tokens, segment_ids = one_epoch(documents, seq_len)
    assert tokens.dtype == segment_ids.dtype == np.int32
    expected = [token for document in documents for token in (DOCUMENT_START, *document)]
    assert tokens[segment_ids != 0].tolist() == expected
    # Padding is zeros, shorter than a sequence, and only at the very end.
    padding = np.flatnonzero(segment_ids.ravel() == 0)
    assert padding.tolist() == list(range(len(expected), tokens.size))
    assert len(padding) < seq_len
    assert (tokens[segment_ids == 0] == 0).all()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8), seq_len=st.integers(2, 20))
def test_segments_are_the_documents_of_a_row(lengths, seq_len):
    documents = [counting_document(37 * i, length) for i, length in enumerate(lengths)]
    for tokens, ids in zip(*one_epoch(documents, seq_len), strict=True):
        used = ids[ids != 0]
        assert used[0] == 1
        new = tokens[1 : len(used)] == DOCUMENT_START
        # A new segment starts exactly where a document starts.
        np.testing.assert_array_equal(np.diff(used), new)


def batches(seed=0):
    documents = [counting_document(i, 5 + 7 * i) for i in range(9)]
    return TrainingBatches(documents, seq_len=16, batch_size=3, seed=seed)


def take(iterator, count):
    return [(batch.tokens, batch.segment_ids) for batch in itertools.islice(iterator, count)]


# An epoch has 20 sequences, or six and two thirds batches, so the positions span several epochs.
@pytest.mark.parametrize("position", [0, 1, 3, 4, 13])
def test_resume_gives_the_same_batches(position):
    straight = batches()
    take(straight, position)
    state = json.loads(json.dumps(straight.get_state()))
    resumed = batches()
    take(resumed, 5)  # resuming must not depend on the current position
    resumed.set_state(state)
    for expected, got in zip(take(straight, 12), take(resumed, 12), strict=True):
        np.testing.assert_array_equal(expected, got)


def test_order_depends_on_seed_and_epoch():
    first, again, other = take(batches(), 12), take(batches(), 12), take(batches(seed=1), 12)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[:6], first[6:])


def test_an_epoch_has_every_row_once():
    documents = [counting_document(i, 63) for i in range(6)]
    rows = TrainingBatches(documents, seq_len=16, batch_size=4, seed=5)
    for _ in range(2):
        epoch = np.concatenate([tokens for tokens, _ in take(rows, 6)])
        np.testing.assert_array_equal(np.unique(epoch, axis=0).shape, (24, 16))


def write(folder: Path, texts: dict[str, bytes]) -> Path:
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)
    return folder


def test_folders_are_searched_and_binary_or_hidden_files_left_out(tmp_path):
    folder = write(
        tmp_path / "texts",
        {
            "a.txt": b"first",
            "deep/er/b.md": b"\xff\xfe not utf-8",
            "empty.txt": b"",
            "image.png": b"\x89PNG\0\0",
            ".git/config": b"hidden folder",
            ".secret": b"hidden file",
            "__pycache__/x.py": b"cache",
            "copy.txt": b"first",
        },
    )
    (folder / "link").symlink_to(folder / "deep")
    os.mkfifo(folder / "pipe")
    corpus = load_corpus([folder])
    assert sorted(corpus.train + corpus.validation) == [b"first", b"\xff\xfe not utf-8"]
    assert corpus.read == {".txt": 1, ".md": 1}
    assert corpus.skipped == {
        "binary .png": 1,
        "empty": 1,
        "hidden": 2,
        "folders __pycache__": 1,
        "links to folders": 1,
        "not a file": 1,
        "copies of others": 1,
    }
    assert corpus.summary.startswith(f"read 2 files (1 .md, 1 .txt) of {folder}; skipped: 2 hidden")
    # A file that is named explicitly is used as it is.
    named = load_corpus([folder / "image.png", folder / "a.txt"])
    assert sorted(named.train + named.validation) == [b"first", b"\x89PNG\0\0"]


def test_split_depends_on_bytes_only_and_never_overlaps(tmp_path):
    texts = {f"{i}.txt": f"document {i}".encode() for i in range(100)}
    one = load_corpus([write(tmp_path / "one", texts)])
    renamed = {f"sub/{99 - i}.rst": text for i, text in enumerate(texts.values())}
    two = load_corpus([write(tmp_path / "two", renamed | {"copy.txt": b"document 7"})])
    assert (one.train, one.validation, one.fingerprint) == (
        two.train,
        two.validation,
        two.fingerprint,
    )
    assert len(one.validation) == 5
    assert set(one.train) | set(one.validation) == set(texts.values())
    assert not set(one.train) & set(one.validation)
    changed = load_corpus([write(tmp_path / "one", {"0.txt": b"another"})])
    assert changed.fingerprint != one.fingerprint


def test_a_single_document_is_cut(tmp_path):
    text = counting_document(0, 1000)
    corpus = load_corpus([write(tmp_path, {"book.txt": text}) / "book.txt"])
    assert corpus.train == (text[:950],)
    assert corpus.validation == (text[950:],)


def test_default_is_the_source_of_the_standard_library():
    corpus = load_corpus()
    library = Path(sysconfig.get_path("stdlib"))
    documents = set(corpus.train + corpus.validation)
    assert (library / "dataclasses.py").read_bytes() in documents
    assert (library / "json" / "decoder.py").read_bytes() in documents
    # Installed packages and the library's tests are not part of its text.
    assert Path(np.__file__).read_bytes() not in documents
    assert sum(map(len, documents)) > 1_000_000
    assert list(corpus.read) == [".py"]
    assert corpus.skipped["folders test"] <= 1 < corpus.skipped["folders __pycache__"]
    assert corpus.fingerprint == load_corpus().fingerprint


def test_missing_path(tmp_path):
    with pytest.raises(ValueError, match=r"text must be files or folders that exist, got .*nope"):
        load_corpus([tmp_path / "nope"])


def test_path_that_is_neither_file_nor_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"text must be files or folders that exist, got .*pipe"):
        load_corpus([tmp_path / "pipe"])


@pytest.mark.parametrize("texts", [{}, {"empty.txt": b""}, {"one.txt": b"x"}])
def test_no_text(tmp_path, texts):
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder, texts)
    with pytest.raises(ValueError, match=r"text must hold at least two bytes, got .*texts"):
        load_corpus([folder])


def test_unreadable_file(tmp_path, monkeypatch):
    # Permissions do not restrict the superuser, who may run the tests.
    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    file = write(tmp_path, {"a.txt": b"text"}) / "a.txt"
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"text must be readable, got .*a\.txt'.*denied"):
        load_corpus([file])


def test_held_out_rows_are_fixed_and_filled_up():
    documents = [counting_document(i, 40) for i in range(4)]
    got = validation_batches(documents, seq_len=16, batch_size=4, num_sequences=6)
    again = validation_batches(documents, seq_len=16, batch_size=4, num_sequences=6)
    assert [batch.tokens.shape for batch in got] == [(4, 16), (4, 16)]
    for one, two in zip(got, again, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
    assert (got[0].segment_ids > 0).any(axis=1).all()
    assert (got[1].segment_ids > 0).any(axis=1).tolist() == [True, True, False, False]
    # A request for more than there is returns everything.
    most = validation_batches(documents, seq_len=16, batch_size=1, num_sequences=1000)
    assert sum(int((batch.segment_ids > 0).sum()) for batch in most) == 4 * 41


def test_row_for_the_picture_has_two_documents():
    documents = [counting_document(i, 200 + i) for i in range(4)]
    row = example_sequence(documents, seq_len=32)
    assert row.tokens.shape == (1, 32)
    assert row.segment_ids.max() >= 2


def test_unigram_loss_by_hand():
    tokens = np.asarray([[256, 97, 98, 256, 99, 97, 0]], np.int32)
    segment_ids = np.asarray([[1, 1, 1, 2, 2, 3, 0]], np.int32)
    # The targets are 97 and 98 (after the start and after 97), and 99. The single 97 of segment 3
    # is not a target.
    got = unigram_loss([b"aab", b"c"], [Batch(tokens=tokens, segment_ids=segment_ids)])
    total = 4 + 256
    expected = -(math.log(3 / total) + math.log(2 / total) + math.log(2 / total)) / 3
    assert got == pytest.approx(expected, rel=1e-12)
