"""The token store: documents as one flat array of token ids, mapped into memory.

::

    tokens.npy    (n_tokens,) uint16, or uint32 for a vocabulary beyond 65,536: all documents, each ending with eos
    offsets.npy   (n_documents + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]]
    meta.json     schema, tokenizer, settings, counts, what was left out, sources and files with sizes and checksums

A store grows in ``FOLDER.partial`` and is renamed when it is whole. ``build_store`` makes one, ``open_store`` reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from recollect import __version__
from recollect.core.ahead import Make, WorkerDiedError, made_ahead
from recollect.core.config import differences
from recollect.core.errors import ConfigError, DataError, RecollectError
from recollect.core.files import lock_directory, write_atomically
from recollect.text.documents import Documents, Source, Sources, counted, read_documents
from recollect.text.tokenizer import Ints, TextTokenizer, Tokens, token_dtype

SCHEMA = 1
"""Raised whenever an older reader would misread the files."""
TOKENS, OFFSETS, META = "tokens.npy", "offsets.npy", "meta.json"
BLOCK_CHARS = 1 << 20
"""Characters that are tokenised at once; they decide nothing but how often progress is told."""
Split = Literal["train", "valid", "all"]


class Progress(NamedTuple):
    """How far ``build_store`` is."""

    documents: int
    tokens: int
    done: int
    """Bytes of the sources that were read."""
    total: int
    """Bytes of all sources."""


class TokenStore:
    """Read-only documents. ``store.document(i)`` is one; ``text.rows`` makes batches of them."""

    def __init__(self, path: Path, meta: dict[str, Any], tokens: Tokens, offsets: Ints) -> None:
        self.path = path
        self.meta = meta
        self.tokens = tokens
        """(n_tokens,) mapped."""
        self.offsets = offsets
        """(n_documents + 1,)"""
        tokenizer = meta["tokenizer"]
        self.tokenizer_name: str = tokenizer["name"]
        self.fingerprint: str = tokenizer["fingerprint"]
        self.vocab_size: int = tokenizer["vocab_size"]
        self.eos_id: int = tokenizer["eos_id"]

    @property
    def n_documents(self) -> int:
        """Documents in the store."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents, ends included."""
        return len(self.tokens)

    @property
    def skipped(self) -> dict[str, int]:
        """Documents that were left out, by reason."""
        return self.meta["skipped"]

    @cached_property
    def lengths(self) -> Ints:
        """(n_documents,) tokens of each, its end included."""
        return np.diff(self.offsets)

    def document(self, i: int) -> Tokens:
        """Token ids of a document, its end included; no copy. Raises DataError where there is none."""
        if not 0 <= i < self.n_documents:
            raise DataError(f"{self.path}: document numbers lie in 0..{self.n_documents - 1}, got {i}")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def split(self, part: Split) -> Ints:
        """Numbers of the documents for training, of those held out for validation, or of all, ascending.

        A hash of (seed, number) decides, with the ``valid_share`` and ``seed`` that the store was built with; at least
        one document is held out, and at least one is not. Raises ConfigError for "valid" if that share is 0.
        """
        settings = self.meta["settings"]
        share: float = settings["valid_share"]
        if part == "valid" and share == 0:
            raise ConfigError(f"{self.path} holds no documents out: build it with a valid_share")
        if part == "all" or share == 0:
            return np.arange(self.n_documents, dtype=np.int64)
        held_out = _held_out(self.n_documents, share, settings["seed"])
        return np.flatnonzero(held_out if part == "valid" else ~held_out)

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raise DataError if these ids were made by another tokenizer."""
        if tokenizer.fingerprint != self.fingerprint:
            raise DataError(
                f"{self.path} was made with tokenizer '{self.tokenizer_name}' ({self.fingerprint[:12]}), not with "
                f"'{tokenizer.name}' ({tokenizer.fingerprint[:12]}): use that one, or build the store again"
            )


def build_store(
    sources: Sources,
    folder: str | os.PathLike[str],
    tokenizer: TextTokenizer,
    *,
    field: str = "text",
    split_on: str | None = None,
    min_chars: int = 0,
    min_tokens: int = 0,
    valid_share: float = 0.0,
    seed: int = 0,
    workers: int = 0,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> TokenStore:
    """The store of ``sources`` at ``folder``, tokenised unless it is there already. See ``read_documents`` for sources.

    Documents shorter than ``min_chars`` characters or ``min_tokens`` tokens (the end counts) are left out and counted.
    ``valid_share`` of the documents is held out: see ``TokenStore.split``. The bytes do not depend on ``workers``, the
    processes that tokenise (0: this one); each reads all sources, which a byte tokenizer gains nothing from. After a
    kill there is a whole store or none. ``progress`` is called after every block of about a million characters; when
    ``stop()`` says True there, the build ends with RecollectError and nothing is kept.

    Raises ConfigError for settings that cannot be; DataError for sources that cannot be read or hold no document, for
    a store with other settings or of sources that have changed since, or when the disk is full, another process writes
    the store, or a worker was killed. Memory: a few blocks for every worker, and 8 bytes a document.
    """
    if not 0 <= valid_share < 1:
        raise ConfigError(f"valid_share must be at least 0 and below 1, got {valid_share}")
    if workers < 0:
        raise ConfigError(f"workers must not be negative, got {workers}; 0 tokenises in this process")
    path = Path(folder)
    documents = read_documents(sources, field, split_on=split_on, min_chars=min_chars)
    kept = {"field": field, "split_on": split_on, "min_chars": min_chars, "min_tokens": min_tokens}
    settings = {**kept, "valid_share": valid_share, "seed": seed}
    meta: dict[str, Any] = {
        "schema": SCHEMA,
        "recollect": __version__,
        "tokenizer": {key: getattr(tokenizer, key) for key in ("name", "fingerprint", "vocab_size", "eos_id")},
        "settings": settings,
    }
    if path.exists():
        return _reused(path, meta, documents.sources)
    blocks = _Blocks(documents.sources, field, split_on, min_chars, min_tokens, tokenizer)
    with _partial(path) as partial:
        if path.exists():  # another process finished it meanwhile
            return _reused(path, meta, documents.sources)
        meta["sources"] = [asdict(_recorded(source)) for source in documents.sources]
        # Closed at once, whatever happens: a generator that an exception still refers to would keep its workers.
        with closing(_made(blocks, workers, path)) as made:
            _write(partial, path, meta, made, documents.total, progress, stop)
    return open_store(path)


def open_store(folder: str | os.PathLike[str], *, verify: bool = False) -> TokenStore:
    """Map a store; ``verify`` also reads every byte and compares checksums.

    Raises DataError if it is missing, unfinished, of another schema, or damaged. Cost: reads 8 bytes a document.
    """
    path = Path(folder)
    meta = _read_meta(path)
    try:
        tokens, offsets = (_map(path / name, meta["files"][name], verify) for name in (TOKENS, OFFSETS))
        store = TokenStore(path, meta, tokens, offsets)
        whole = (
            len(tokens) == meta["n_tokens"]
            and store.n_documents == meta["n_documents"] > 0
            and tokens.dtype == token_dtype(store.vocab_size)
            and {"valid_share", "seed"} <= meta["settings"].keys()
        )
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path / META} is damaged: remove {path} and build it again") from None
    if not whole or offsets[0] != 0 or offsets[-1] != len(tokens) or (store.lengths < 1).any():
        raise DataError(f"{path} is damaged: its files do not fit together; remove it and build it again")
    return store


class _Block(NamedTuple):
    """Some documents, tokenised. The counts are of everything read until then."""

    tokens: Tokens
    lengths: Ints
    few_tokens: int
    """Documents of this block with fewer than ``min_tokens``."""
    skipped: dict[str, int]
    done: int
    is_last: bool


@dataclass(frozen=True)
class _Blocks:
    """The blocks of documents, by number; it travels to the processes that tokenise."""

    sources: tuple[Source, ...]
    field: str
    split_on: str | None
    min_chars: int
    min_tokens: int
    tokenizer: TextTokenizer

    def __call__(self) -> Make:
        """What makes the block of a number; numbers must ascend. After the last block come empty ones."""
        documents = Documents(self.sources, self.field, self.split_on, self.min_chars)
        numbered = enumerate(_in_blocks(documents))

        def make(number: int) -> _Block:
            texts = next((texts for i, texts in numbered if i == number), None)
            skipped, done = dict(documents.skipped), documents.done
            if texts is None:
                none = np.empty(0, token_dtype(self.tokenizer.vocab_size))
                return _Block(none, np.empty(0, np.int64), 0, skipped, done, True)
            tokens, lengths = self.tokenizer.encode_documents(texts)
            enough = lengths >= self.min_tokens
            if not enough.all():
                tokens, lengths = tokens[np.repeat(enough, lengths)], lengths[enough]
            return _Block(tokens, lengths, int((~enough).sum()), skipped, done, False)

        return make


def _in_blocks(documents: Documents) -> Iterator[list[str]]:
    texts: list[str] = []
    n_chars = 0
    for text in documents:
        texts.append(text)
        n_chars += len(text)
        if n_chars >= BLOCK_CHARS:
            yield texts
            texts, n_chars = [], 0
    if texts:
        yield texts


class _QuietBlocks(NamedTuple):
    """Blocks for a worker: one of many processes, it leaves the other cores alone."""

    blocks: _Blocks

    def __call__(self) -> Make:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return self.blocks()


def _made(blocks: _Blocks, workers: int, path: Path) -> Generator[_Block]:
    """Every block in order, made here or by processes, and the empty one after the last."""
    numbers = range(sys.maxsize)
    with made_ahead(_QuietBlocks(blocks), numbers, workers) if workers else nullcontext(blocks()) as make:
        for number in numbers:
            try:
                block: _Block = make(number)
            except WorkerDiedError as how:
                raise DataError(
                    f"a process that tokenised for {path} {how}; nothing was kept: run the same command again, with "
                    f"fewer workers if memory ran out"
                ) from None
            yield block
            if block.is_last:
                return


def _write(
    partial: Path,
    path: Path,
    meta: dict[str, Any],
    blocks: Iterator[_Block],
    total: int,
    progress: Callable[[Progress], None] | None,
    stop: Callable[[], bool] | None,
) -> None:
    """Write the blocks into ``partial`` and rename it to ``path``."""
    dtype = token_dtype(meta["tokenizer"]["vocab_size"])
    all_lengths: list[Ints] = []
    n_documents = n_tokens = few_tokens = 0
    skipped: dict[str, int] = {}
    with (partial / TOKENS).open("wb") as file:
        file.write(_header(dtype, 0))
        for block in blocks:
            file.write(block.tokens.data)
            all_lengths.append(block.lengths)
            n_documents += len(block.lengths)
            n_tokens += len(block.tokens)
            few_tokens += block.few_tokens
            skipped = {**block.skipped, "with few tokens": few_tokens}
            if progress is not None:
                progress(Progress(n_documents, n_tokens, block.done, total))
            if stop is not None and stop():
                raise RecollectError(f"{path}: stopped after {n_documents} documents; nothing was kept")
        file.seek(0)
        file.write(_header(dtype, n_tokens))
        _flush(file)
    settings = meta["settings"]
    if n_documents == 0:
        raise DataError(f"{path}: no document is left to store: {counted(skipped)}; lower min_tokens")
    if settings["valid_share"] and n_documents == 1:
        raise DataError(
            f"{path}: one document cannot be shared out: split it (split_on) or hold none out (valid_share 0)"
        )
    with (partial / OFFSETS).open("wb") as file:
        np.save(file, np.concatenate([[0], np.cumsum(np.concatenate(all_lengths), dtype=np.int64)]))
        _flush(file)
    files = {name: _file_spec(partial / name) for name in (TOKENS, OFFSETS)}
    counts = {"n_documents": n_documents, "n_tokens": n_tokens, "skipped": skipped}
    write_atomically(partial / META, json.dumps({**meta, **counts, "files": files}, indent=2, sort_keys=True).encode())
    partial.rename(path)


@contextmanager
def _partial(path: Path) -> Generator[Path]:
    """The folder to write into, for this process alone; if it is not renamed to ``path``, it is removed again."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        unlock = lock_directory(partial)
    except BlockingIOError:
        raise DataError(f"{partial} is being written by another process: let it finish") from None
    except OSError as error:
        raise DataError(f"{partial} cannot be written: {error.strerror}") from None
    try:
        strangers = [each.name for each in partial.iterdir() if each.name.lstrip(".").partition(".")[0] not in _OURS]
        if strangers:
            raise DataError(f"{partial} holds something else ({min(strangers)}): remove it or choose another folder")
        try:
            for each in partial.iterdir():  # of a build that was killed
                each.unlink()
            yield partial
        except OSError as error:
            raise DataError(f"{partial} cannot be written: {error.strerror or error}; nothing was kept") from None
        finally:
            # After the rename there is none.
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        unlock()


@dataclass(frozen=True)
class _Recorded:
    """What a store remembers of a source."""

    name: str
    bytes: int
    modified_ns: int
    sha256: str


def _recorded(source: Source) -> _Recorded:
    try:
        return _Recorded(source.name, source.size, source.modified_ns, source.digest())
    except OSError as error:
        raise DataError(f"{source.name} cannot be read: {error.strerror or error}") from None


def _reused(path: Path, meta: Mapping[str, Any], sources: tuple[Source, ...]) -> TokenStore:
    """The store at ``path`` if it is what would be built. Reads only sources whose time of change, or name, is another:
    the same bytes found elsewhere, or by another path, are the same source.
    """
    store = open_store(path)
    told = {key: store.meta[key] for key in ("tokenizer", "settings")}
    told["tokenizer"] = {**told["tokenizer"], "name": meta["tokenizer"]["name"]}
    changed = differences(told, {key: meta[key] for key in told})
    try:
        known = [_Recorded(**each) for each in store.meta["sources"]]
    except (KeyError, TypeError):
        raise DataError(f"{path / META} is damaged: remove {path} and build it again") from None
    others = f"sources: {_names(each.name for each in known)} -> {_names(each.name for each in sources)}"
    if not changed and len(sources) != len(known):
        changed = [others]
    for source, before in zip(sources, known, strict=False) if not changed else ():
        same_name = source.name == before.name
        same_time = same_name and source.modified_ns == before.modified_ns and source.kind != "hub"
        if source.size != before.bytes or not (same_time or source.digest() == before.sha256):
            changed.append(f"{source.name} has changed since" if same_name else others)
    if changed:
        raise DataError(f"{path} holds other tokens ({changed[0]}): remove it or choose another folder")
    return store


def _names(names: Iterator[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:2]) + (f" and {len(listed) - 2} more" if len(listed) > 2 else "")


def _held_out(n: int, share: float, seed: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(n,) which documents are held out: those whose 64-bit hash of (seed, number) lies in the lowest ``share``.

    No two hashes are equal. The lowest is always held out and the highest never, so that neither part is empty.
    """
    start = int.from_bytes(hashlib.blake2b(f"valid/{seed}".encode(), digest_size=8).digest(), "big")
    mixed = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finaliser of SplitMix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed <= max(int(share * 2**64), int(mixed.min()))) & (mixed < mixed.max())


def _read_meta(path: Path) -> dict[str, Any]:
    if not (path / META).is_file():
        if path.exists():
            raise DataError(f"{path} is not a token store: it has no {META}")
        if path.with_name(path.name + ".partial").exists():
            raise DataError(f"{path} is unfinished: run the command that was building it again")
        raise DataError(f"{path}: no such token store; build it first")
    try:
        meta = json.loads((path / META).read_text("utf-8"))
        schema = meta["schema"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path / META} is damaged: remove {path} and build it again") from None
    if schema != SCHEMA:
        raise DataError(f"{path} has schema {schema}, this version reads {SCHEMA}: remove it and build it again")
    return meta


def _map(path: Path, spec: Mapping[str, Any], verify: bool) -> Any:
    again = f"remove {path.parent} and build it again"
    if not path.is_file():
        raise DataError(f"{path} is missing: {again}")
    size = path.stat().st_size
    if size != spec["bytes"]:
        raise DataError(f"{path} is damaged: {size} bytes, expected {spec['bytes']}; {again}")
    if verify and _sha256(path) != spec["sha256"]:
        raise DataError(f"{path} is damaged: its checksum differs; {again}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        raise DataError(f"{path} is damaged: its header cannot be read; {again}") from None
    if array.dtype.str != spec["dtype"] or array.ndim != 1:
        raise DataError(f"{path} is damaged: its header differs from {META}; {again}")
    # A plain view: slicing a np.memmap costs several times more than slicing an array over the same pages.
    return array.view(np.ndarray)


def _file_spec(path: Path) -> dict[str, Any]:
    dtype = np.load(path, mmap_mode="r", allow_pickle=False).dtype.str
    return {"bytes": path.stat().st_size, "dtype": dtype, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(dtype: np.dtype[Any], rows: int) -> bytes:
    """A ``.npy`` header. NumPy pads it so that its length does not depend on the number of rows."""
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, "fortran_order": False, "shape": (rows,)})
    return buffer.getvalue()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


_OURS = {name.partition(".")[0] for name in (TOKENS, OFFSETS, META)}
