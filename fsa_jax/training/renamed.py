"""Old spellings of arguments, fields and flags, which work for one more release.

A caller who uses an old spelling gets a DeprecationWarning, and the command line also prints a line
on standard error. Giving both spellings at once is a ValueError. Files that earlier versions wrote
are read without a warning.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fsa_jax.messages import say

#: Files whose frames are not the caller's. Without the suffix, since Python 3.12 does not take a
#: whole path for a prefix of itself.
_SKIPPED_FRAMES = tuple(
    file.removesuffix(".py") for file in (__file__, dataclasses.__file__, copy.__file__)
)


def with_new_names(values: Mapping[str, Any], new_names: Mapping[str, str]) -> dict[str, Any]:
    """The values with every old name replaced.

    Args:
      values: values by name.
      new_names: the new name of each old one.

    Raises:
      ValueError: a value is given under both names.

    Example:
      >>> with_new_names({"row_length": 64, "seed": 0}, {"row_length": "seq_len"})
      {'seed': 0, 'seq_len': 64}
    """
    renamed = dict(values)
    for old, new in new_names.items():
        if old not in renamed:
            continue
        if new in renamed:
            raise ValueError(
                f"{new} and {old}, its old name, must not both be given, got "
                f"{new}={renamed[new]!r} and {old}={renamed[old]!r}"
            )
        renamed[new] = renamed.pop(old)
    return renamed


def renamed_arguments[**P, R](**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets callers of a function give keyword arguments by their old names.

    Args:
      **new_names: the new name of each old one.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        untyped: Any = function

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            renamed = with_new_names(kwargs, new_names)
            for old in kwargs.keys() & new_names.keys():
                _warn(old, new_names[old])
            return untyped(*args, **renamed)

        return call

    return decorate


def renamed_fields[Class: type](**new_names: str) -> Callable[[Class], Class]:
    """Lets callers give and read fields of a dataclass by their old names.

    Args:
      **new_names: the new name of each old one.
    """

    def decorate(cls: Class) -> Class:
        fields = [field.name for field in dataclasses.fields(cls)]
        original: Callable[..., None] = cls.__init__
        init = renamed_arguments(**new_names)(original)

        @functools.wraps(original)
        def __init__(self, *args, **kwargs):
            unchanged = [
                new
                for old, new in new_names.items()
                if old in kwargs and _is_unchanged(old, new, kwargs, fields)
            ]
            for new in unchanged:
                del kwargs[new]
            init(self, *args, **kwargs)

        cls.__init__ = __init__
        for old, new in new_names.items():
            setattr(cls, old, _old_field(old, new))
        return cls

    return decorate


def _is_unchanged(old: str, new: str, given: Mapping[str, Any], fields: Sequence[str]) -> bool:
    """Whether `dataclasses.replace` gave the field `new`, rather than a caller who also gave `old`.

    `replace` gives every field: first those that its caller changes, and then the others in the
    order of the class.
    """
    if not given.keys() >= set(fields):
        return False
    order = list(given)
    before = set(order[: order.index(new)])
    return before >= {old, *fields[: fields.index(new)]}


def _old_field(old: str, new: str) -> property:
    def read(self) -> Any:
        _warn(old, new)
        return getattr(self, new)

    return property(read, doc=f"Old name of `{new}`.")


def rename_flags(arguments: Sequence[str], new_names: Mapping[str, str]) -> list[str]:
    """The words of a command line with every old flag replaced.

    Args:
      arguments: the words.
      new_names: the new name of each old flag, both without the leading dashes.

    Raises:
      ValueError: both spellings of a flag are given.
    """
    given = given_flags(arguments)
    for old, new in new_names.items():
        if {old, new} <= given:
            raise ValueError(f"--{new} and --{old}, its old name, must not both be given")
        if old in given:
            say(f"--{old} is now called --{new}; the old name will be removed in the next release")
            _warn(f"--{old}", f"--{new}")
    return [_with_new_flag(word, new_names) for word in arguments]


def given_flags(arguments: Sequence[str]) -> set[str]:
    """The flags of a command line, without the leading dashes, and with hyphens."""
    return {name for word in arguments if (name := _flag_name(word))}


def _flag_name(word: str) -> str:
    """The flag of a word like --flag or --flag=value, with hyphens; empty if there is none."""
    return word[2:].partition("=")[0].replace("_", "-") if word.startswith("--") else ""


def _with_new_flag(word: str, new_names: Mapping[str, str]) -> str:
    new = new_names.get(_flag_name(word))
    if new is None:
        return word
    _, equals, value = word.partition("=")
    return f"--{new}{equals}{value}"


def _warn(old: str, new: str) -> None:
    """Warns the caller: the first frame outside this module and those that copy a dataclass."""
    warnings.warn(
        f"{old} is now called {new}; the old name will be removed in the next release",
        DeprecationWarning,
        skip_file_prefixes=_SKIPPED_FRAMES,
    )
