"""The samples of the retrieval tasks: a context, a question at its end, and the answer.

Both tasks ask for a value that the context has shown once. In *recall* the context is a list of
random keys with their values, and in *needle* it is real text with one key and its value hidden in
it. Keys are random letters and values random digits, so that a model cannot know them.
"""

import dataclasses
import string

import numpy as np

from fsa_jax.evaluation.text import Text

_KEY_LETTERS = 5
#: With fewer pairs there is nothing to choose from.
_FEWEST_PAIRS = 2
#: The task is part of the seed of a sample.
_NUMBERS = {"recall": 1, "needle": 2}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
      prompt: int32 tokens, the context and the question.
      answer: int32 tokens of the answer.
    """

    prompt: np.ndarray
    answer: np.ndarray


class Samples:
    """Makes the samples of the tasks; each follows from the seed and its own place alone.

    Args:
      text: the real text of the needle, and the tokenizer.
      seed: the seed.
      digits: number of digits of a value.
    """

    def __init__(self, text: Text, *, seed: int, digits: int):
        self._text = text
        self._seed = seed
        self._digits = digits
        begin = text.tokenizer.begin
        self._begin = np.asarray([] if begin is None else [begin], np.int32)

    def make(self, task: str, length: int, depth: float, number: int) -> Sample:
        """A sample whose prompt and answer together have at most `length` tokens.

        Args:
          task: "recall" or "needle".
          length: tokens of prompt and answer.
          depth: where in the context the answer stands, from 0 to 1.
          number: number of the sample among those of this task, length and depth.

        Raises:
          ValueError: the length holds no sample, or the text is too short for it.
        """
        # Seeds are integers: the depth counts in millionths.
        place = (_NUMBERS[task], length, round(depth * 1_000_000), number)
        rng = np.random.default_rng([self._seed, *place])
        return (self._recall if task == "recall" else self._needle)(rng, length, depth)

    def _recall(self, rng: np.random.Generator, length: int, depth: float) -> Sample:
        """As many pairs as fit, and the question for the one at the depth."""
        (line_break,) = self._encode("\n")
        pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        used, pair, question, answer = len(self._begin), 0, 0, 0
        # Key, value and line break are at least a token each, so that these are enough.
        keys = _draw(rng, string.ascii_lowercase, _KEY_LETTERS, length // 3 + 1)
        questions = self._encode(*(f"{key}=" for key in keys))
        values = self._encode(*self._values(rng, len(keys)))
        for key, asked, value in zip(keys, questions, values, strict=True):
            if key in pairs:
                continue
            pair = len(asked) + len(value) + len(line_break)
            # Any of the keys may be the one that is asked for.
            question, answer = max(question, len(asked)), max(answer, len(value))
            if used + pair + question + answer > length:
                break
            used += pair
            pairs[key] = asked, value
        if len(pairs) < _FEWEST_PAIRS:
            least = used + (_FEWEST_PAIRS - len(pairs)) * pair + question + answer
            raise ValueError(
                f"lengths must hold {_FEWEST_PAIRS} keys with their values, a question and its "
                f"answer, {least} tokens or more, got {length}"
            )
        lines = [part for pair in pairs.values() for part in (*pair, line_break)]
        asked, value = list(pairs.values())[round(depth * (len(pairs) - 1))]
        return Sample(np.concatenate([self._begin, *lines, asked]), value)

    def _needle(self, rng: np.random.Generator, length: int, depth: float) -> Sample:
        """A stretch of the text with a needle at the depth, and the question for it."""
        (key,), (digits,) = _draw(rng, string.ascii_lowercase, _KEY_LETTERS), self._values(rng)
        # A value is encoded apart, so that it has the same tokens in the context and as an answer.
        asked, value, line_break = self._encode(f"\nThe pass key is {key}=", digits, "\n")
        needle = np.concatenate([asked, value, line_break])
        room = length - sum(map(len, (self._begin, needle, asked, value)))
        if room < 0:
            raise ValueError(
                "lengths must hold the needle, the question and its answer, "
                f"{length - room} tokens or more, got {length}"
            )
        text = self._text.stretch
        if room > len(text):
            raise ValueError(
                f"lengths must be at most {length - room + len(text)}, the tokens of the "
                f"text and of the needle, got {length}: give a longer text"
            )
        first = int(rng.integers(len(text) - room + 1))
        hay = text[first : first + room]
        cut = round(depth * room)
        parts = [self._begin, hay[:cut], needle, hay[cut:], asked]
        return Sample(np.concatenate(parts), value)

    def _values(self, rng: np.random.Generator, count: int = 1) -> list[str]:
        return _draw(rng, string.digits, self._digits, count)

    def _encode(self, *texts: str) -> list[np.ndarray]:
        found = self._text.tokenizer.encode([text.encode() for text in texts])
        return [tokens.astype(np.int32) for tokens in found]


def _draw(rng: np.random.Generator, letters: str, size: int, count: int = 1) -> list[str]:
    """Random words of `size` letters."""
    drawn = rng.integers(len(letters), size=count * size)
    text = np.frombuffer(letters.encode(), np.uint8)[drawn].tobytes().decode()
    return [text[i : i + size] for i in range(0, len(text), size)]
