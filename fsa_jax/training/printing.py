"""Generated tokens as text on standard output, while they come."""

from collections.abc import Sequence

import numpy as np

from fsa_jax.training.tokenizer import Tokenizer


class TextEnded(Exception):
    """The text has come to its end before the last token that was asked for."""


class TokenPrinter:
    """Prints a text in whole characters as its tokens are generated.

    Args:
      tokenizer: what the tokens mean. The text ends before one of its stop tokens.
      prompt: the text that is continued, which is printed first.
      tokens: its tokens.
      stop: the text ends after this one; empty: it does not.
      max_bytes: the text ends with the token that makes it this many bytes long.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        tokens: Sequence[int],
        *,
        stop: str,
        max_bytes: int,
    ):
        self._stops, self._stop, self._left = tokenizer.stops, stop, max_bytes
        self._stream = tokenizer.stream(tokens)
        self._prompt, self._recent = prompt, ""

    def add(self, token: np.ndarray) -> None:
        """Prints what is complete with one more token, int32 [1].

        Raises:
          TextEnded: no more tokens are needed.
        """
        if token[0] in self._stops:
            raise TextEnded
        self._print(self._stream.add(int(token[0])))

    def finish(self) -> None:
        """Prints the rest, and ends the line."""
        self._print(self._stream.finish(), last=True)
        print()

    def _print(self, text: str, last: bool = False) -> None:
        # The stop may begin in the text before.
        recent = self._recent + text
        found = recent.find(self._stop) if self._stop else -1
        if found >= 0:
            text = recent[len(self._recent) : found + len(self._stop)]
        self._recent = recent[1 - len(self._stop) or len(recent) :] if self._stop else ""
        # The prompt is printed with the first token, and so never before an error in the arguments.
        print(self._prompt + text, end="", flush=True)
        self._prompt = ""
        self._left -= len(text.encode())
        if not last and (found >= 0 or self._left <= 0):
            raise TextEnded


def prompt_tokens(tokenizer: Tokenizer, prompt: bytes) -> list[int]:
    """The tokens of a text that a model continues: the begin token, if there is one, and the text.

    Raises:
      ValueError: there is no token, or the text is not UTF-8.
    """
    try:
        tokens = tokenizer.encode([prompt])[0].tolist()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt must be UTF-8, got {prompt!r}") from error
    if tokenizer.begin is not None:
        tokens.insert(0, tokenizer.begin)
    if not tokens:
        raise ValueError("prompt must not be empty: the tokenizer has no begin token, got ''")
    return tokens
