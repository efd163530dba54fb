"""Writing files so that a reader, or a process that is killed, never meets half of one."""

from __future__ import annotations

import os
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
        partial.unlink(missing_ok=True)
        raise RecollectError(f"'{path}' cannot be written: {error.strerror}") from None
