"""From the paths that `--text` names to a corpus: reading, tokenising and splitting."""

import array
import collections
import contextlib
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from fsa_jax.messages import say
from fsa_jax.training.corpus import Corpus, TokenCorpus, listed
from fsa_jax.training.documents import ByteDocuments, Documents, Mixture, TokenDocuments
from fsa_jax.training.text_files import (
    find_files,
    has_records,
    read_documents,
    suffix,
    walk,
)
from fsa_jax.training.token_cache import (
    VALIDATION_EVERY,
    IndexedTokens,
    cached,
    cut_point,
    distinct,
    file_digest,
    write_index,
)
from fsa_jax.training.token_files import (
    ARRAY_RECORD,
    TokenData,
    TokenWriter,
    copy_records,
    digest_of,
    is_token_data,
    read_tokens,
)
from fsa_jax.training.tokenizer import Tokenizer

#: The version of what the cache holds for the same text.
_VERSION = "1"

#: Plain files for the byte tokenizer are held in memory up to this many bytes.
_IN_MEMORY = 2**28

#: Texts are tokenised together up to this many bytes and documents.
_BATCH_BYTES, _BATCH_DOCUMENTS = 2**22, 1024

# Folders of the standard library that are not its own source text: installed packages, and tests
# with their data (half of all bytes, much of it tables).
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


def load_corpus(paths: Sequence[Path] = ()) -> Corpus:
    """Reads documents into memory and splits them into a training and a validation set.

    The order and the split follow from a hash of each document's bytes, so they depend neither on
    paths nor on the order in which a folder lists its files. Identical documents count once, so a
    copy of a training document is never in the validation set. A single document is cut: its last
    5% are the validation set.

    Args:
      paths: text files, whatever their suffix; files of records (`.jsonl`, `.jsonl.gz`, `.parquet`)
        with a column "text"; and folders, which are searched recursively. Hidden files in a folder
        are skipped, and so are binary ones, which have a NUL byte in their first 8 KiB. Empty: the
        standard library's *.py files.

    Returns:
      The corpus.

    Raises:
      ValueError: a path is missing or unreadable, or the files hold no text.

    Example:
      >>> corpus = load_corpus()
      >>> len(corpus.train) > len(corpus.validation) > 0
      True
    """
    return _Source([Path(path) for path in paths], "text").in_memory()


def open_corpus(
    paths: Sequence[Path] = (),
    *,
    tokenizer: Tokenizer,
    column: str = "text",
    weights: Sequence[float] = (),
) -> Corpus | TokenCorpus:
    """Opens documents of any kind. The order and the split are those of `load_corpus`.

    Documents are tokenised once. Their tokens are cached in fsa-jax/tokens of the user's cache
    folder, under a hash of the text and the tokenizer, and memory-mapped. Only the byte tokenizer
    has no need of that for plain files of up to 256 MiB together, which are held in memory.

    Args:
      paths: as for `load_corpus`, or pre-tokenised data, see `write_tokens`. Files in folders that
        are not UTF-8 are skipped, except by the byte tokenizer.
      tokenizer: the tokenizer.
      column: the column of the text in files of records.
      weights: one for each path: the share of packed sequences that each path provides is its
        weight divided by the sum. Empty: all documents count alike.

    Raises:
      ValueError: a path is missing or unreadable, or the files hold no text.
      OSError: the cache cannot be written.
    """
    if weights:
        return _mixture([_Source([path], column) for path in paths], tuple(weights), tokenizer)
    source = _Source(paths, column)
    if tokenizer.unit == "byte" and source.is_small_text():
        return source.in_memory()
    indexed = source.indexed(tokenizer)
    return TokenCorpus(
        train=indexed.train,
        validation=indexed.validation,
        source=source.name,
        fingerprint=indexed.fingerprint,
        read=source.read,
        skipped=source.skipped + collections.Counter(indexed.skipped),
        counts=(indexed.counts,),
        tokenizer=tokenizer,
    )


def open_documents(
    paths: Sequence[Path], *, tokenizer: Tokenizer, column: str = "text"
) -> tuple[Documents, str]:
    """Opens all documents that `open_corpus` would split, those for training first.

    Args:
      paths: as for `open_corpus`.
      tokenizer: the tokenizer.
      column: the column of the text in files of records.

    Returns:
      The documents, a single one in one piece, and the paths, described for a human reader.

    Raises:
      ValueError: a path is missing or unreadable, or the files hold no text.
      OSError: the cache cannot be written.
    """
    source = _Source(paths, column)
    if tokenizer.unit == "byte" and source.is_small_text():
        corpus = source.in_memory()
        texts = (*corpus.train, *corpus.validation)
        whole = b"".join(texts)
        single = hashlib.sha256(hashlib.sha256(whole).digest()).hexdigest() == corpus.fingerprint
        return ByteDocuments((whole,) if single else texts), source.name
    indexed = source.indexed(tokenizer)
    train, validation = indexed.train, indexed.validation
    starts = np.concatenate([train.starts, validation.starts])
    lengths = np.concatenate([np.diff(part.ends, prepend=0) for part in (train, validation)])
    if len(indexed.digests) == 1:
        # The document itself starts where its training part does. Unless its validation part is
        # what follows there, that part is a copy with a begin token of its own.
        copied = starts[1] != starts[0] + lengths[0] and tokenizer.begin is not None
        starts, lengths = starts[:1], np.asarray([lengths.sum() - copied])
    whole = TokenDocuments(train.tokens, starts, np.cumsum(lengths), train.vocab_size)
    return whole, source.name


def _mixture(
    sources: Sequence["_Source"], weights: tuple[float, ...], tokenizer: Tokenizer
) -> TokenCorpus:
    indexed = [source.indexed(tokenizer) for source in sources]
    train = []
    for at, (source, own) in enumerate(zip(sources, indexed, strict=True)):
        others = [other for i, other in enumerate(indexed) if i != at]
        train.append(_without_validation(source, own, others))
    whole = "".join(own.fingerprint for own in indexed).encode()
    none: collections.Counter[str] = collections.Counter()
    return TokenCorpus(
        train=Mixture(tuple(train), weights),
        validation=Mixture(tuple(own.validation for own in indexed), weights),
        source=", ".join(source.name for source in sources),
        fingerprint=hashlib.sha256(whole).hexdigest(),
        read=sum((source.read for source in sources), none),
        skipped=sum(
            (
                source.skipped + collections.Counter(own.skipped)
                for source, own in zip(sources, indexed, strict=True)
            ),
            none,
        ),
        counts=tuple(
            own.counts if documents is own.train else documents.counts()
            for documents, own in zip(train, indexed, strict=True)
        ),
        tokenizer=tokenizer,
    )


def _without_validation(
    source: "_Source", own: IndexedTokens, others: Sequence[IndexedTokens]
) -> TokenDocuments:
    """The training documents of a source that no other source holds out."""
    held_out = [other.digests[: len(other.validation)] for other in others]
    taken = {digest.tobytes() for digests in held_out for digest in digests}
    # The two parts of a single document, which is cut, have one digest.
    digests = own.digests[-len(own.train) :]
    # The first eight bytes find the few candidates.
    likely = np.flatnonzero(np.isin(digests[:, 0], np.concatenate(held_out)[:, 0]))
    dropped = np.zeros(len(own.train), bool)
    dropped[[i for i in likely if digests[i].tobytes() in taken]] = True
    if dropped.all():
        raise ValueError(
            "text must be different for each of text_weights, got only documents in "
            f"{source.name} that are held out of another"
        )
    return own.train.without(dropped)


class _Source:
    """Paths whose documents are pooled.

    Args:
      paths: files and folders; empty: the standard library.
      column: the column of the text in files of records.

    Attributes:
      name: the paths, described for a human reader.
      read: number of files, by suffix.
      skipped: number of files that were found and skipped, by reason and suffix.
    """

    def __init__(self, paths: Sequence[Path], column: str):
        self.skipped: collections.Counter[str] = collections.Counter()
        self._column = column
        self._data: Path | None = None
        self._files: list[Path] = []
        self._named = {path for path in paths if not path.is_dir()}
        if data := [path for path in paths if is_token_data(path)]:
            if len(paths) > 1:
                raise ValueError(
                    "text must be pre-tokenised data alone, or with text_weights beside other "
                    f"text, got {str(data[0])!r} and {len(paths) - 1} more"
                )
            self._data = data[0]
            self._files = [] if data[0].is_dir() else data
        elif paths:
            self._files = [file for path in paths for file in find_files(path, self.skipped)]
        else:
            self._files = list(self._library())
        self.name = ", ".join(str(path) for path in paths) or (
            f"the Python standard library in {_library()}"
        )
        self.read = collections.Counter(map(suffix, self._files))

    def _library(self) -> Iterator[Path]:
        for file in walk(_library(), self.skipped, _NOT_LIBRARY):
            if file.suffix == ".py":
                yield file
            else:
                self.skipped[suffix(file)] += 1

    def is_small_text(self) -> bool:
        """Whether the files are plain text, and few enough bytes for memory."""
        if self._data or any(map(has_records, self._files)):
            return False
        sizes = []
        for file in self._files:
            with contextlib.suppress(OSError):  # reading the file says what is wrong
                sizes.append(file.stat().st_size)
        return sum(sizes) <= _IN_MEMORY

    def in_memory(self) -> Corpus:
        """The documents as bytes."""
        read: collections.Counter[str] = collections.Counter()
        by_hash: dict[bytes, bytes] = {}
        for file in self._files:
            before = len(by_hash)
            for _, text in read_documents(file, self._column):
                if text:
                    copies = by_hash.setdefault(hashlib.sha256(text).digest(), text) is not text
                    self.skipped["copies of others"] += copies
                else:
                    self.skipped["empty"] += 1
            read[suffix(file)] += len(by_hash) > before
        self.skipped, read = +self.skipped, +read  # without zeros
        documents = [by_hash[digest] for digest in sorted(by_hash)]
        if sum(map(len, documents)) < 2:
            raise self._no_text("bytes", self.skipped)
        if len(documents) == 1:
            cut = cut_point(len(documents[0]))
            validation, train = [documents[0][cut:]], [documents[0][:cut]]
        else:
            count = max(1, len(documents) // VALIDATION_EVERY)
            validation, train = documents[:count], documents[count:]
        return Corpus(
            train=tuple(train),
            validation=tuple(validation),
            source=self.name,
            fingerprint=hashlib.sha256(b"".join(sorted(by_hash))).hexdigest(),
            read=read,
            skipped=self.skipped,
        )

    def _no_text(self, unit: str, skipped: Mapping[str, int]) -> ValueError:
        return ValueError(
            f"text must hold at least two {unit}, got fewer in {self.name}; skipped: "
            f"{listed(skipped) or 'none'}"
        )

    def indexed(self, tokenizer: Tokenizer) -> IndexedTokens:
        """The documents as memory-mapped tokens."""
        parts = [_VERSION, tokenizer.fingerprint]
        data = self._data
        if data is not None and data.suffix == ARRAY_RECORD and data.is_file():
            parts += ["records", file_digest(data)]
            return cached(_key(parts), lambda to: self._copy(to, data, tokenizer))
        if data is not None:
            mapped = read_tokens(
                data,
                begin=tokenizer.begin,
                end=tokenizer.end,
                tokenizer=tokenizer.fingerprint,
            )
            parts += ["tokens", *map(file_digest, mapped.files)]
            return cached(_key(parts), lambda to: self._index(to, mapped, tokenizer), mapped.tokens)
        described = []
        for file in self._files:
            kind = suffix(file) if has_records(file) else "named" * (file in self._named)
            described.append(f"{kind} {file_digest(file)}")
        parts += [self._column, *sorted(described)]
        return cached(_key(parts), lambda to: self._tokenize(to, tokenizer))

    def _copy(self, folder: Path, file: Path, tokenizer: Tokenizer) -> None:
        self._index(folder, copy_records(file, folder, tokenizer.vocab_size), tokenizer)

    def _index(self, folder: Path, data: TokenData, tokenizer: Tokenizer) -> None:
        """Writes the index of pre-tokenised data."""
        digests, kept = bytearray(), []
        skipped: collections.Counter[str] = collections.Counter()
        for i, (start, stop) in enumerate(
            zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True)
        ):
            if start == stop:
                skipped["empty"] += 1
                continue
            name = f"{self._data}, document {i},"
            digests += digest_of(data.tokens[start:stop], tokenizer.vocab_size, name)
            kept.append((start, stop - start))
        spans = np.asarray(kept, np.int64).reshape(-1, 2)
        if spans[:, 1].sum() < 2:
            raise self._no_text("tokens", skipped)
        order, keys = distinct(digests)
        if copies := len(spans) - len(order):
            skipped["copies of others"] = copies
        spans = spans[order]
        if len(spans) == 1:
            (start, length), cut = spans[0], cut_point(int(spans[0, 1]))
            spans = np.asarray([[start + cut, length - cut], [start, cut]])
        write_index(
            folder, data.tokens, spans, keys, vocab_size=tokenizer.vocab_size, skipped=skipped
        )

    def _tokenize(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Writes the tokens of all files and their index."""
        say(f"tokenising {len(self._files)} files of {self.name}")
        skipped: collections.Counter[str] = collections.Counter()
        digests = bytearray()
        begin, end = (
            np.asarray([] if token is None else [token], np.int64)
            for token in (tokenizer.begin, tokenizer.end)
        )
        lengths, tokens = array.array("q"), begin
        with TokenWriter(folder, tokenizer.vocab_size) as writer:
            for texts in self._batches(tokenizer, skipped):
                for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
                    if not len(tokens):
                        skipped["empty"] += 1
                        continue
                    digests += hashlib.sha256(text).digest()
                    lengths.append(len(tokens))
                    writer.add(np.concatenate([begin, tokens, end]))
            order, keys = distinct(digests)
            if sum(lengths[i] for i in order.tolist()) < 2:
                raise self._no_text(f"{tokenizer.unit}s", skipped)
            if copies := len(lengths) - len(order):
                skipped["copies of others"] = copies
            offsets = np.array(writer.offsets)
            spans = np.stack([offsets[:-1], np.diff(offsets)], axis=1)[order]
            if len(order) == 1:  # all documents are copies of the last one
                cut = cut_point(len(tokens))
                last = np.concatenate([begin, tokens[cut:], end])
                spans = np.asarray(
                    [[writer.offsets[-1], len(last)], [spans[0, 0], len(begin) + cut]], np.int64
                )
                writer.add(last)
        written = read_tokens(folder).tokens
        write_index(folder, written, spans, keys, vocab_size=tokenizer.vocab_size, skipped=skipped)

    def _batches(
        self, tokenizer: Tokenizer, skipped: collections.Counter[str]
    ) -> Iterator[list[bytes]]:
        """The texts that are not empty, some at a time."""
        texts, size = [], 0
        for file in self._files:
            for where, text in read_documents(file, self._column):
                if not text:
                    skipped["empty"] += 1
                elif tokenizer.unit != "byte" and not _is_utf8(text):
                    if has_records(file) or file in self._named:
                        raise ValueError(f"{where}: text must be UTF-8 for this tokenizer")
                    skipped[f"not UTF-8 {suffix(file)}"] += 1
                else:
                    texts.append(text)
                    size += len(text)
                if size >= _BATCH_BYTES or len(texts) == _BATCH_DOCUMENTS:
                    yield texts
                    texts, size = [], 0
        if texts:
            yield texts


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _key(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))
