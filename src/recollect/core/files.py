"""Files that are never met half-written, and locks that end with their process."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from recollect.core.errors import RecollectError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: written beside it, synced to disk, then renamed over it.

    Folders that are missing are made. Raises RecollectError when the file cannot be written; what was there stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RecollectError(f"'{path}' cannot be written: {error.strerror}") from None


@contextmanager
def locked(path: Path, *, wait: bool) -> Generator[None]:
    """Hold the lock file ``path`` for this process; the system lets go of it however the process ends.

    With ``wait`` until it is free; else BlockingIOError at once when another process holds it. Systems without POSIX
    locks have none: there, the caller sees to it that two processes do not write the same place.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def lock_directory(path: Path) -> Callable[[], None]:
    """Lock a directory for this process, also while it is renamed; returns what lets go of it.

    BlockingIOError when another process, or this one, holds it. Systems and file systems without locks have none.
    """
    try:
        import fcntl
    except ImportError:
        return lambda: None
    held = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise
    except OSError:  # a file system without locks
        os.close(held)
        return lambda: None
    descriptors = [held]

    def unlock() -> None:
        while descriptors:
            os.close(descriptors.pop())

    return unlock
