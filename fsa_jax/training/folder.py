"""The folder of a run: its owner, the process that writes to it, and what a new run may replace.

A run writes only the files named here. A folder with the `run.json` of a run belongs to this
program. Other files in it, and all other folders, belong to the user and are never deleted.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsa_jax.messages import naming, say

METRICS, DESCRIPTION, CHECKPOINTS = "metrics.jsonl", "run.json", "checkpoints"
LOSSES, BLOCKS = "loss.png", "blocks.png"
#: Files for TensorBoard, and the beginning of their names.
TENSORBOARD, _EVENTS = "tensorboard", "events.out.tfevents."
WHAT = "fsa-jax train"
#: The copy of the tokenizer and of its begin and end tokens.
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

#: Names, followed by a number, of the copies that a resumed run keeps of damaged files.
DAMAGED_METRICS, DAMAGED_CHECKPOINT = "damaged-metrics-", "damaged-checkpoint-"

_LOCK = ".fsa-jax.lock"
#: The text that a lock file begins with: a file of that name with other text is the user's.
_HOLDER = "process "
#: Keys that every description has, including those of versions that did not write the key "what".
_KEYS_OF_DESCRIPTION = frozenset({"config", "versions", "devices", "parameters", "unigram_loss"})
#: A file that is in every orbax checkpoint, finished or not.
_MARK_OF_CHECKPOINT = "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"
#: Errors of file systems that do not support locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def has_checkpoint(folder: Path) -> bool:
    """Whether the folder of a run holds a complete checkpoint."""
    checkpoints = folder / CHECKPOINTS
    # orbax writes under another name, and renames the folder once it is complete.
    return checkpoints.is_dir() and any(
        _is_step(child.name) and child.is_dir() for child in checkpoints.iterdir()
    )


def check_startable(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises ValueError unless a run may start or, with `resume`, continue in the folder."""
    name = str(folder)
    if resume:
        if not has_checkpoint(folder):
            raise ValueError(f"resume must find a checkpoint in out, got {name!r} without one")
    elif not overwrite:
        if found := _worth_keeping(folder):
            raise ValueError(
                f"out must not hold a run already, got {name!r}, where {found} is: set resume to "
                "continue it, overwrite to replace it, or out to another folder"
            )
    elif found := _not_ours(folder):
        raise ValueError(
            "overwrite must replace only a run that this program wrote, got "
            f"{name!r}, where {found}: set out to another folder, or delete it yourself"
        )


def _worth_keeping(folder: Path) -> str | None:
    """The name of a file or folder that a new run would replace; None if there is none."""
    tokenizer = (TOKENIZER, TOKENIZER_CONFIG)
    for name in (CHECKPOINTS, METRICS, DESCRIPTION, LOSSES, BLOCKS, TENSORBOARD, *tokenizer):
        path = folder / name
        if not os.path.lexists(path):
            continue
        if name in (CHECKPOINTS, TENSORBOARD) and path.is_dir():
            empty = not any(path.iterdir())
        elif name == METRICS and path.is_file():
            empty = not path.stat().st_size
        else:  # a run that ended before its first step leaves its description and its tokenizer
            left = name in (DESCRIPTION, *tokenizer) and path.is_file()
            empty = left and _is_description(folder / DESCRIPTION)
        if not empty:
            return name
    return None


def _not_ours(folder: Path) -> str | None:
    """Why a new run must not replace the contents of the folder; None if it may."""
    if _worth_keeping(folder) and not _is_description(folder / DESCRIPTION):
        return f"there is no {DESCRIPTION} of a run"
    for name in (METRICS, DESCRIPTION, LOSSES, BLOCKS, TOKENIZER, TOKENIZER_CONFIG):
        if (folder / name).is_dir():
            return f"{name} is a folder"
    events = folder / TENSORBOARD
    if events.is_symlink() or (os.path.lexists(events) and not events.is_dir()):
        return f"{TENSORBOARD} is not a folder"
    for child in events.iterdir() if events.is_dir() else ():
        if not _is_events(child):
            return f"{TENSORBOARD}/{child.name} is not a file for TensorBoard"
    checkpoints = folder / CHECKPOINTS
    if not os.path.lexists(checkpoints):
        return None
    if checkpoints.is_symlink():
        return f"{CHECKPOINTS} is a symbolic link"
    if not checkpoints.is_dir():
        return f"{CHECKPOINTS} is not a folder"
    others = [child.name for child in checkpoints.iterdir() if not _is_checkpoint(child)]
    return f"{CHECKPOINTS}/{min(others)} is not a checkpoint" if others else None


def _is_checkpoint(path: Path) -> bool:
    if not path.is_dir() or path.is_symlink():
        return False
    step, unfinished, _ = path.name.partition(_UNFINISHED)
    finished = not unfinished and (path / _MARK_OF_CHECKPOINT).is_file()
    return _is_step(step) and (bool(unfinished) or finished)


def _is_events(path: Path) -> bool:
    return path.name.startswith(_EVENTS) and path.is_file() and not path.is_symlink()


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _is_description(path: Path) -> bool:
    """Whether a file is the `run.json` of a run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(found, dict):
        return False
    return found.get("what") == WHAT or ("what" not in found and set(found) >= _KEYS_OF_DESCRIPTION)


def read_description(folder: Path) -> dict[str, Any] | None:
    """The contents of `run.json`; None where there is none, or another file of that name."""
    path = folder / DESCRIPTION
    return json.loads(path.read_text(encoding="utf-8")) if _is_description(path) else None


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Writes `run.json` atomically."""
    new = folder / f".fsa-jax.{DESCRIPTION}.new"
    text = json.dumps({"what": WHAT} | description, indent=2) + "\n"
    with naming(new):
        new.write_text(text, encoding="utf-8")
    new.replace(folder / DESCRIPTION)


def clear(folder: Path) -> None:
    """Deletes the run in a folder that `check_startable` has accepted with overwrite."""
    checkpoints = folder / CHECKPOINTS
    for child in checkpoints.iterdir() if checkpoints.is_dir() else ():
        shutil.rmtree(child)
    events = folder / TENSORBOARD
    if events.is_dir():
        shutil.rmtree(events)
    # The description is deleted last: until then it marks the folder as that of a run.
    for name in (METRICS, LOSSES, BLOCKS, TOKENIZER, TOKENIZER_CONFIG, DESCRIPTION):
        (folder / name).unlink(missing_ok=True)


def kept_aside(folder: Path, name: str) -> Path:
    """A path in the folder that does not exist yet: the name, followed by a number."""
    number = 1
    while os.path.lexists(folder / f"{name}{number}"):
        number += 1
    return folder / f"{name}{number}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the folder against other runs; the system releases the lock when the process ends.

    Raises:
      ValueError: another run holds the lock, or a file of the same name is not a lock.
      OSError: the folder cannot be written to.
    """
    path = folder / _LOCK
    descriptor = _open_locked(path)
    try:
        with naming(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{_HOLDER}{os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        # The file is deleted before the lock is released, so that a lock file that exists is held.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        if path.is_symlink():
            raise ValueError(f"out must not hold a link named {_LOCK}, got {str(path)!r}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if os.pread(descriptor, len(_HOLDER), 0) not in (b"", _HOLDER.encode()):
                raise ValueError(
                    f"out must not hold a file {_LOCK} of another program, got {str(path)!r}"
                )
            _lock(descriptor, path.parent)
            # The previous holder may have deleted the file after it was opened here.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
        raise ValueError(
            f"out must not be in use by another run, got {str(folder)!r}, to which {holder} writes"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        say(f"{folder} cannot be locked ({error.strerror}): do not start a second run in it")
