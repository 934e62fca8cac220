"""Messages on standard error, and file errors that name the file."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

PROGRAM = "fsa-jax"


def say(message: str) -> None:
    """Prints a line to standard error; the run goes on if standard error is closed."""
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)


def say_now(message: str) -> None:
    """Like `say`, bypassing Python's buffers, since a signal may interrupt a print."""
    with contextlib.suppress(OSError):
        os.write(2, f"{PROGRAM}: {message}\n".encode(errors="replace"))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError without one, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
