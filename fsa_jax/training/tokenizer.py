"""Tokenizers: bytes, or a `tokenizer.json` of Hugging Face.

A document is the begin token, if the tokenizer has one, the tokens of the text, and the end token,
if it has one. The post-processor of a `tokenizer.json` is not used.
"""

import codecs
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fsa_jax.messages import naming
from fsa_jax.training.config import BYTES, DOCUMENT_START, VOCAB_SIZE
from fsa_jax.training.folder import TOKENIZER, TOKENIZER_CONFIG

_MODEL_CONFIGS = ("generation_config.json", "config.json")
#: A key of the settings in the folder of a run: all tokens that end a text.
_STOPS = "stop_token_ids"
#: What a decoder makes of an incomplete character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
      unit: what a token is called in messages: "byte" or "token".
      vocab_size: all tokens are below it.
      drawn: a model draws only tokens below it.
      begin: token at the start of every document; None: there is none.
      end: token at the end of every document; None: there is none.
      stops: tokens at which a generated text ends.
      fingerprint: the same for tokenizers that give the same tokens, from the bytes of the file.
      num_bytes: int64 [vocab_size], the bytes of text that each token stands for; 0 for special
        ones.
    """

    unit: str
    vocab_size: int
    drawn: int
    begin: int | None
    end: int | None
    stops: tuple[int, ...]
    fingerprint: str
    num_bytes: np.ndarray

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The tokens of each text, as integers [n], without begin and end."""
        ...

    def stream(self, prompt: Sequence[int]) -> "TextStream":
        """Decodes the tokens that follow a prompt."""
        ...


class TextStream(Protocol):
    """Tokens to text, one at a time, in whole characters."""

    def add(self, token: int) -> str:
        """The text that is complete with one more token."""
        ...

    def finish(self) -> str:
        """The rest, with U+FFFD for a character that is not complete."""
        ...


class ByteTokenizer:
    """The bytes themselves, and one more token that starts a document. See `Tokenizer`."""

    unit = "byte"
    vocab_size = VOCAB_SIZE
    drawn = DOCUMENT_START  # the document start is never a training target
    begin: int | None = DOCUMENT_START
    end: int | None = None
    stops: tuple[int, ...] = ()
    fingerprint = BYTES

    def __init__(self):
        self.num_bytes = np.where(np.arange(VOCAB_SIZE) < DOCUMENT_START, 1, 0)

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [np.frombuffer(text, np.uint8) for text in texts]

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """See `Tokenizer`."""
        return _ByteStream()


class _ByteStream:
    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class FileTokenizer:
    """A `tokenizer.json`. See `Tokenizer`.

    Args:
      file: the file. Begin and end tokens are read from the files beside it.

    Raises:
      ValueError: the file is not a tokenizer that gives back its text.
    """

    unit = "token"

    def __init__(self, file: Path):
        # Imported here: reading the configuration of a run of bytes does not need it.
        import tokenizers

        self.file = file
        self.content = _read_bytes(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.content.decode("utf-8"))
            described = json.loads(self.content)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(
                f"tokenizer must be a tokenizer.json of Hugging Face, got {str(file)!r}: {error}"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"tokenizer must have tokens, got none in {str(file)!r}")
        self.vocab_size = self.drawn = max(vocabulary.values()) + 1
        self.num_bytes = self._byte_counts(vocabulary, described)
        self.begin, self.end, self.stops = self._special_tokens(vocabulary)
        named = json.dumps([self.begin, self.end, *self.stops]).encode()
        self.fingerprint = hashlib.sha256(self.content + named).hexdigest()

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer`.

        Raises:
          UnicodeDecodeError: a text is not UTF-8.
        """
        decoded = [text.decode("utf-8") for text in texts]
        encoded = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int64) for encoding in encoded]

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """See `Tokenizer`."""
        return _TokenStream(self._tokenizer.decode, prompt)

    def config(self) -> dict[str, Any]:
        """Begin and end tokens as the `tokenizer_config.json` of a run."""
        begin, end = (
            None if token is None else self._tokenizer.id_to_token(token)
            for token in (self.begin, self.end)
        )
        return {"bos_token": begin, "eos_token": end, _STOPS: list(self.stops)}

    def _special_tokens(self, vocabulary: Mapping[str, int]):
        """Begin, end and stop tokens.

        Those of `tokenizer_config.json` count, also where it says that there is none. Only where it
        says nothing, the ids of `generation_config.json` or else `config.json` do.
        """
        settings = _settings(self.file.with_name(TOKENIZER_CONFIG))
        models = [_settings(self.file.with_name(name)) for name in _MODEL_CONFIGS]
        found: dict[str, list[int]] = {}
        for name in ("bos", "eos"):
            if f"{name}_token" in settings:
                found[name] = self._named(settings[f"{name}_token"], name, vocabulary)
            else:
                ids = (model.get(f"{name}_token_id") for model in models)
                found[name] = self._ids(next((x for x in ids if x is not None), []), name)
        if settings.get("add_bos_token") is False:
            found["bos"] = []
        more = settings.get(_STOPS, models[0].get("eos_token_id") or [])
        stops = dict.fromkeys(found["eos"] + self._ids(more, "eos"))
        begin, end = (found[name][0] if found[name] else None for name in ("bos", "eos"))
        return begin, end, tuple(stops)

    def _named(self, token: Any, name: str, vocabulary: Mapping[str, int]) -> list[int]:
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            return []
        if not isinstance(token, str) or token not in vocabulary:
            raise ValueError(
                f"{name}_token must be a token of {str(self.file)!r}, got {token!r} in "
                f"{TOKENIZER_CONFIG}"
            )
        return [vocabulary[token]]

    def _ids(self, ids: Any, name: str) -> list[int]:
        ids = ids if isinstance(ids, list) else [ids]
        for token in ids:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name}_token_id must be below the {self.vocab_size} tokens of "
                    f"{str(self.file)!r}, got {token!r}"
                )
        return ids

    def _byte_counts(self, vocabulary: Mapping[str, int], described: Any) -> np.ndarray:
        """The bytes of each token, from its name in the vocabulary."""
        kinds = _kinds(described.get("decoder"))
        if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
            raise ValueError(
                "tokenizer must give back the spaces of a text, with a decoder ByteLevel, "
                f"Metaspace or ByteFallback, got {sorted(kinds)} in {str(self.file)!r}"
            )
        counts = np.zeros(self.vocab_size, np.int64)
        for name, token in vocabulary.items():
            if "ByteLevel" in kinds:  # each character of the name is a byte
                counts[token] = len(name)
            elif len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
                counts[token] = 1
            else:
                counts[token] = len(name.replace("▁", " ").encode())
        # Added tokens are spelled as they are. The special ones are not text.
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            counts[token] = 0 if added.special else len(added.content.encode())
        return counts


def _kinds(described: Any) -> set[str]:
    """The types in the description of a decoder, which may be a sequence of others."""
    if not isinstance(described, dict):
        return set()
    inner = (_kinds(part) for part in described.get("decoders", ()))
    return {str(described.get("type"))}.union(*inner) - {"Sequence"}


class _TokenStream:
    """Decodes a few tokens again with each new one.

    What a token reads as depends on those before it: a character may be spread over several, and
    decoders drop the space at the start of a text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]):
        self._decode = decode
        # A few tokens before the first that is not shown yet are context enough.
        self._tokens = list(prompt[-_CONTEXT:])
        self._shown = len(self._tokens)

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._rest()
        # Later tokens may complete the character.
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._tokens = self._tokens[max(0, self._shown - _CONTEXT) :]
        self._shown = len(self._tokens)
        return text

    def finish(self) -> str:
        text = self._rest()
        self._shown = len(self._tokens)
        return text

    def _rest(self) -> str:
        """The text of the tokens that are not shown yet."""
        before = self._decode(self._tokens[: self._shown])
        return self._decode(self._tokens)[len(before) :]


_CONTEXT = 6


def _settings(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file does not exist."""
    if not file.exists():
        return {}
    try:
        found = json.loads(_read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer must have readable files, got {str(file)!r}: {error}") from (
            error
        )
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} must hold a JSON object, got {type(found).__name__}")
    return found


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"tokenizer must be bytes, a tokenizer.json or a folder with one, got {str(file)!r}: "
            f"{error.strerror}"
        ) from error


@functools.cache
def byte_tokenizer() -> ByteTokenizer:
    """The tokenizer of models of bytes."""
    return ByteTokenizer()


def load_tokenizer(name: str) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      name: "bytes", a `tokenizer.json`, or a folder with one, such as that of a model or of a run.

    Raises:
      ValueError: there is no such file, or it is not a tokenizer.

    Example:
      >>> load_tokenizer("bytes").vocab_size
      257
    """
    if name == BYTES:
        return byte_tokenizer()
    path = Path(name)
    return FileTokenizer(path / TOKENIZER if path.is_dir() else path)


def keep_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer into the folder of a run, so that the run does without the original."""
    if not isinstance(tokenizer, FileTokenizer):
        return
    settings = json.dumps(tokenizer.config(), indent=2, ensure_ascii=False) + "\n"
    # The tokenizer is written last: where it is, its settings are too.
    for name, content in ((TOKENIZER_CONFIG, settings.encode()), (TOKENIZER, tokenizer.content)):
        new = folder / f".fsa-jax.{name}.new"
        with naming(new):
            new.write_bytes(content)
        new.replace(folder / name)


def tokenizer_of_run(folder: Path, name: str) -> Tokenizer:
    """The tokenizer that a run was trained with.

    Args:
      folder: the folder of the run.
      name: the tokenizer in the configuration of the run.
    """
    return load_tokenizer(BYTES if name == BYTES else str(folder / TOKENIZER))
