"""What needles are hidden in: endless streams of sentences, words or ids, and the reader's own text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Literal

import numpy as np

from recollect.core.errors import ConfigError
from recollect.text.suite.names import hex_id
from recollect.text.suite.prose import sentences
from recollect.text.suite.vocabulary import ADJECTIVES, THINGS

Haystack = Literal["noise", "words", "ids", "prose", "files"]
HAYSTACKS: tuple[Haystack, ...] = ("noise", "words", "ids", "prose", "files")

NOISE = "The rain fell on the quiet street all night, and nobody came by."

MAX_SENTENCE = 300
"""Characters after which a sentence of a user's text is cut at a space, so that lengths can be met."""


def check_haystack(name: str, haystack: str, files: tuple[str, ...]) -> None:
    """Raises ConfigError for an unknown haystack, or files that are not used or not there."""
    if haystack not in HAYSTACKS:
        raise ConfigError(f"{name}: haystack must be one of {', '.join(HAYSTACKS)}, got '{haystack}'")
    if files and haystack != "files":
        raise ConfigError(f"{name}: files are given but haystack is '{haystack}'; set haystack=files")
    if haystack == "files" and not files:
        raise ConfigError(f"{name}: haystack 'files' needs at least one text file in files")


def filler(haystack: Haystack, rng: np.random.Generator, files: tuple[str, ...] = ()) -> Iterator[str]:
    """Units of a haystack without end. A user's text begins at a random sentence and begins again after its last.

    Raises ConfigError for a file that cannot be read.
    """
    if haystack == "noise":
        return repeat(NOISE)
    if haystack == "words":
        return _words(rng)
    if haystack == "ids":
        return _ids(rng)
    return sentences(rng) if haystack == "prose" else _turning(rng, _sentences_of(_stamps(files)))


def _words(rng: np.random.Generator) -> Iterator[str]:
    words = (*THINGS, *ADJECTIVES)
    while True:
        yield from (words[i] for i in rng.integers(0, len(words), 256).tolist())


def _ids(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield hex_id(rng, 32)


def _turning(rng: np.random.Generator, found: tuple[str, ...]) -> Iterator[str]:
    at = int(rng.integers(len(found)))
    while True:
        yield from found[at:]
        at = 0


def _stamps(files: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    try:
        return tuple((name, Path(name).stat().st_mtime_ns) for name in files)
    except OSError as error:
        raise ConfigError(f"haystack file '{error.filename}' cannot be read: {error.strerror}") from None


@lru_cache(maxsize=4)
def _sentences_of(stamps: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Sentences of all files in order, white space made single spaces."""
    found: list[str] = []
    for name, _ in stamps:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise ConfigError(f"haystack file '{name}' cannot be read: {why}") from None
        for sentence in re.split(r"(?<=[.!?])\s+|\n{2,}", text):
            found += _cut(" ".join(sentence.split()))
    if not found:
        raise ConfigError(f"haystack files hold no text: {', '.join(name for name, _ in stamps)}")
    return tuple(found)


def _cut(sentence: str) -> Iterator[str]:
    while len(sentence) > MAX_SENTENCE:
        at = sentence.rfind(" ", 1, MAX_SENTENCE)
        at = MAX_SENTENCE if at < 0 else at
        yield sentence[:at].strip()
        sentence = sentence[at:].strip()
    if sentence:
        yield sentence
