"""The corpus of a run: documents to train on and others for validation."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from fsa_jax.training.documents import ByteDocuments, Mixture, TokenDocuments, sources_of
from fsa_jax.training.renamed import renamed_fields
from fsa_jax.training.tokenizer import Tokenizer, byte_tokenizer

# A list of counts has at most this many names.
_MAX_SHOWN = 6


class _Summary:
    """What both kinds of corpus say about themselves."""

    source: str
    read: Mapping[str, int]
    skipped: Mapping[str, int]

    @property
    def summary(self) -> str:
        """One line that says which files were read and which were skipped."""
        read = f"read {sum(self.read.values())} files ({listed(self.read)}) of {self.source}"
        return f"{read}; skipped: {listed(self.skipped) or 'none'}"


@renamed_fields(held_out="validation")
@dataclasses.dataclass(frozen=True)
class Corpus(_Summary):
    """Training documents, validation documents, and a fingerprint of their bytes.

    Attributes:
      train: bytes of each training document.
      validation: bytes of each validation document.
      source: the files or folders, described for a human reader.
      fingerprint: hexadecimal SHA-256 over all documents of both splits.
      read: number of files read, by suffix.
      skipped: number of files that were found and skipped, by reason and suffix.
    """

    train: tuple[bytes, ...]
    validation: tuple[bytes, ...]
    source: str
    fingerprint: str
    read: Mapping[str, int] = dataclasses.field(default_factory=dict)
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of bytes."""
        return byte_tokenizer()

    def unigram_counts(self) -> list[np.ndarray]:
        """How often each byte occurs in `train`."""
        return [ByteDocuments(self.train).counts()]

    def sizes(self) -> dict[str, int]:
        """The number of documents and bytes of both splits."""
        return {
            "train_documents": len(self.train),
            "train_bytes": sum(map(len, self.train)),
            "val_documents": len(self.validation),
            "val_bytes": sum(map(len, self.validation)),
        }


@dataclasses.dataclass(frozen=True)
class TokenCorpus(_Summary):
    """Like `Corpus`, with documents of memory-mapped tokens.

    Attributes:
      train: the training documents.
      validation: the validation documents.
      source: the files or folders, described for a human reader.
      fingerprint: hexadecimal SHA-256 over all documents of both splits.
      read: number of files read, by suffix.
      skipped: number of files that were found and skipped, by reason and suffix.
      counts: int64 [V], how often each token occurs in `train`, for each source.
      tokenizer: the tokenizer of the documents.
    """

    train: TokenDocuments | Mixture
    validation: TokenDocuments | Mixture
    source: str
    fingerprint: str
    read: Mapping[str, int]
    skipped: Mapping[str, int]
    counts: tuple[np.ndarray, ...]
    tokenizer: Tokenizer

    def unigram_counts(self) -> list[np.ndarray]:
        """How often each token that a model draws occurs in each source of `train`."""
        return [count[: self.tokenizer.drawn] for count in self.counts]

    def sizes(self) -> dict[str, int]:
        """The number of documents, bytes and, unless they are bytes, tokens of both splits."""
        sizes = {}
        for name, documents in (("train", self.train), ("val", self.validation)):
            sources = sources_of(documents)[0]
            counts = self.counts if name == "train" else [x.counts() for x in sources]
            sizes[f"{name}_documents"] = sum(map(len, sources))
            sizes[f"{name}_bytes"] = sum(int(x @ self.tokenizer.num_bytes) for x in counts)
            if self.tokenizer.unit != "byte":
                sizes[f"{name}_tokens"] = sum(int(x.sum()) for x in counts)
        return sizes


def listed(counts: Mapping[str, int]) -> str:
    """The largest counts, and the sum of the rest, as text."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {name}" for name, count in ordered[:_MAX_SHOWN]]
    rest = sum(count for _, count in ordered[_MAX_SHOWN:])
    return ", ".join(shown + [f"{rest} others"] * bool(rest))
