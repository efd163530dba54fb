"""The one exception users see: a single line saying what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecollectError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with code 2."""


class ConfigError(RecollectError, ValueError):
    """A config that cannot mean anything: an unknown key, a wrong type, an impossible size."""


class DataError(RecollectError):
    """Stored data that is missing, damaged, or of another schema."""


class RunError(RecollectError):
    """A run directory that is missing, damaged, or belongs to another config."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint naming the closest known name, ready to be appended to an error message.

    >>> nearest("mamba3", ["mamba2", "gru"])
    "; did you mean 'mamba2'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""


def described(error: BaseException) -> str:
    """An exception in one line; users know our own by their text alone."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return str(error) if isinstance(error, RecollectError) else f"{type(error).__name__}: {first}"
