"""Messages on standard error, and errors of files that name the file."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

PROGRAM = "fsa-jax"


def say(message: str) -> None:
    """Prints a line; a run goes on where nobody can read it any more."""
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)


def say_now(message: str) -> None:
    """The same past Python's buffers, for a signal that may have come in the middle of a print."""
    with contextlib.suppress(OSError):
        os.write(2, f"{PROGRAM}: {message}\n".encode(errors="replace"))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has an OSError name the file; those of writing, on a full disk say, do not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
