"""A corpus and its token store made on the spot: text for experiments that anyone can run again, without a download."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from recollect.core.config import Config, fingerprint
from recollect.core.errors import ConfigError
from recollect.core.files import locked, write_atomically
from recollect.text.learned import SMALLEST, learn_tokenizer
from recollect.text.store import SCHEMA, TokenStore, build_store
from recollect.text.suite import load_suite
from recollect.text.suite.corpus import corpus
from recollect.text.tokenizer import BYTES, TextTokenizer, load_tokenizer

Counting = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

LEARNED_FROM = 2000
"""Documents that the tokenizer is learned from: more do not change it much."""


@dataclass(frozen=True)
class MadeCorpus(Config, kind="made-corpus"):
    """Prose whose facts come back, and solved tasks of a suite: see ``text.suite.corpus``."""

    n_documents: int = 2000
    lengths: tuple[int, int] = (1024, 16_384)
    """Of documents, in bytes, log-uniform."""
    prose: float = 0.5
    """The share that solves no task."""
    suite: str = "tiny"
    tasks: tuple[str, ...] = ()
    """Of the suite; empty: all of it. One named twice is drawn twice as often."""
    n_restated: int = 8
    """At most so many other questions are answered before a document's own: what a token of text teaches of recall."""
    vocab_size: int = 0
    """Of a tokenizer learned from it; 0: bytes."""
    tokenizer_of: MadeCorpus | None = None
    """Another corpus whose tokenizer this one has; ``vocab_size`` is then that one's."""
    valid_share: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_documents < 2:
            raise ConfigError(f"made-corpus: n_documents must be at least 2, got {self.n_documents}")
        if self.vocab_size and self.vocab_size < SMALLEST:
            raise ConfigError(
                f"made-corpus: vocab_size must be 0 (bytes) or at least {SMALLEST}, got {self.vocab_size}"
            )

    @property
    def folder(self) -> Path:
        """Where it is, or will be: below ``RECOLLECT_DATA``, or runs/data."""
        root = Path(os.environ.get("RECOLLECT_DATA", "runs/data"))
        return root / f"made-corpus-{fingerprint(self)}-v{SCHEMA}"

    def store(self, counting: Counting | None = None) -> TokenStore:
        """Its token store, made by whichever process comes first while the others wait."""
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", wait=True):
            text = folder / "corpus.jsonl"
            if not text.exists():
                write_atomically(text, self._lines(counting or _silent).encode())
            tokenizer = self._tokenizer(text, counting)
            return build_store([str(text)], folder / "store", tokenizer, valid_share=self.valid_share, seed=self.seed)

    def _tokenizer(self, text: Path, counting: Counting | None) -> TextTokenizer:
        if self.tokenizer_of is not None:
            return load_tokenizer(self.tokenizer_of.store(counting).tokenizer_name)
        if not self.vocab_size:
            return load_tokenizer(BYTES)
        learned = self.folder / "tokenizer"
        if not learned.exists():
            with text.open() as lines:
                some = [json.loads(line)["text"] for line, _ in zip(lines, range(LEARNED_FROM), strict=False)]
            learn_tokenizer(some, self.vocab_size, learned)
        return load_tokenizer(learned)

    def _lines(self, counting: Counting) -> str:
        tasks = load_suite(self.suite, self.tasks).tasks
        lines: list[str] = []
        with counting(f"{self.folder}: documents") as show:
            documents = corpus(
                self.seed,
                self.n_documents,
                tasks,
                length=self.lengths,
                prose=self.prose,
                n_restated=self.n_restated,
                drawn=self.tasks,
            )
            for i, document in enumerate(documents, 1):
                lines.append(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
                show(i, self.n_documents)
        return "".join(lines)


def _silent(_: str) -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda _done, _all: None)
