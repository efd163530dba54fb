"""Documents from files: plain text, JSON lines, Parquet and data sets of ``datasets``, read one after the other.

====================================  ==========================================================================
source                                documents
====================================  ==========================================================================
``*.txt``, ``*.md``                   the file, or its parts between ``split_on``
``*.jsonl``, ``*.ndjson``, or ``.gz``   one a line: the string under ``field``
``*.parquet``                         one a row: the string in the column ``field`` (extra ``lm``)
a folder that ``save_to_disk`` wrote  one a row, as Parquet; ``datasets`` is not needed
any other folder                      those of all files above in it and below, sorted by path
``datasets:NAME[:CONFIG]:SPLIT``      one a row of what ``datasets.load_dataset`` gives (extra ``lm``)
====================================  ==========================================================================

What cannot be read stops with its file and line. Documents that are blank or too short are left out and counted.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import mmap
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from recollect.core.errors import ConfigError, DataError, RecollectError, described, nearest

Sources: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Texts: TypeAlias = Iterator[tuple[str | None, int]]
"""A text, None where a row has none, and the bytes of its source that are read then."""

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonl.gz": "lines",
    ".ndjson.gz": "lines",
    ".parquet": "parquet",
}
"""The end of a file's name -> how it is read."""
HUB = "datasets:"
BLANK_LINES = "blank-lines"
"""The ``split_on`` that means one blank line or several."""
BATCH_ROWS = 256


@dataclass(frozen=True)
class Source:
    """One file, or one split of a data set of ``datasets``."""

    name: str
    kind: str

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return Path(self.name)

    @property
    def size(self) -> int:
        """Bytes of the file; of a split, those of its table in memory."""
        if self.kind == "hub":
            return int(_load(self.name).data.nbytes)
        return self._stat().st_size

    @property
    def modified_ns(self) -> int:
        """When the file was written, in ns; 0 for a split."""
        return 0 if self.kind == "hub" else self._stat().st_mtime_ns

    def digest(self) -> str:
        """SHA-256 of the file, in hex; the fingerprint that ``datasets`` gives a split. Cost: reads every byte."""
        if self.kind == "hub":
            return str(_load(self.name)._fingerprint)  # it has no public name
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _stat(self) -> os.stat_result:
        try:
            return self.path.stat()
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror}") from None

    def texts(self, field: str, split_on: str | None) -> Texts:
        """Every document. Raises DataError naming file and line, or row, of what is none."""
        if self.kind == "text":
            return _texts(self.path, split_on)
        if self.kind == "lines":
            return _lines(self.path, field)
        return _hub(self, field) if self.kind == "hub" else _table(self, field)


class Documents:
    """The texts of ``sources`` in order; iterating again begins again. ``read_documents`` makes one."""

    def __init__(self, sources: Sequence[Source], field: str, split_on: str | None, min_chars: int) -> None:
        self.sources = tuple(sources)
        self.field, self.split_on, self.min_chars = field, split_on, min_chars
        self.total = sum(source.size for source in self.sources)
        """Bytes of all sources."""
        self.done = 0
        """Bytes that were read."""
        self.n_read = 0
        """Documents that were handed out."""
        self.skipped = {"blank": 0, "short": 0}
        """Documents left out: without any letter or sign, and with fewer than ``min_chars`` characters."""

    def __iter__(self) -> Iterator[str]:
        """Raises DataError where a source cannot be read, and at the end if there was no document."""
        self.done = self.n_read = before = 0
        self.skipped = {"blank": 0, "short": 0}
        for source in self.sources:
            size = source.size
            try:
                for text, done in source.texts(self.field, self.split_on):
                    self.done = before + done
                    if text is None or not text or text.isspace():
                        self.skipped["blank"] += 1
                    elif len(text) < self.min_chars:
                        self.skipped["short"] += 1
                    else:
                        self.n_read += 1
                        yield text
            except OSError as error:
                raise DataError(f"{source.name} cannot be read: {error.strerror or error}") from None
            before += size
        self.done = self.total
        if self.n_read == 0:
            names = ", ".join(source.name for source in self.sources[:3]) + (", ..." if len(self.sources) > 3 else "")
            raise DataError(f"no document in {names}: {counted(self.skipped)}; give sources that hold text")


def read_documents(
    sources: Sources, field: str = "text", *, split_on: str | None = None, min_chars: int = 0
) -> Documents:
    """The texts of files, folders and data sets (a table of them: above), one at a time.

    ``split_on`` cuts text files at every such string, or at "blank-lines"; parts that are blank are no documents.
    Ends of lines stay as they are. Memory: one document, or ``BATCH_ROWS`` rows of a table.

    Raises DataError for a source that is missing, of an unknown kind, or a folder that holds none; ConfigError for an
    empty ``split_on``; RecollectError where a package is missing.
    """
    if split_on == "":
        raise ConfigError(f"split_on must not be empty; '{BLANK_LINES}' splits at blank lines")
    return Documents(find_sources(sources), field, split_on, min_chars)


def find_sources(sources: Sources) -> tuple[Source, ...]:
    """The files of ``sources``, in the order given, folders sorted by path. Errors as ``read_documents``."""
    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not given:
        raise DataError("no source of documents: give a file, a folder or datasets:NAME:SPLIT")
    found: list[Source] = []
    for each in given:
        name = os.fspath(each)
        path = Path(name).expanduser()
        if name.startswith(HUB):
            _hub_parts(name)
            found.append(Source(name, "hub"))
        elif path.is_dir():
            inside = list(_in_folder(path))
            if not inside:
                raise DataError(f"{path}: no document files in it; they end with {', '.join(KINDS)}")
            found += inside
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder of documents")
        elif (kind := _kind(path)) is None:
            raise DataError(f"{path}: unknown kind of file; documents are read from {', '.join(KINDS)}")
        else:
            found.append(Source(str(path), kind))
    return tuple(found)


def counted(skipped: dict[str, int]) -> str:
    """What was left out, in words: ``3 blank, 1 short left out``."""
    parts = [f"{n} {why}" for why, n in skipped.items() if n]
    return f"{', '.join(parts)} left out" if parts else "none was left out"


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for end, kind in KINDS.items() if name.endswith(end)), None)


def _in_folder(folder: Path) -> Iterator[Source]:
    if (splits := folder / "dataset_dict.json").is_file():
        names = ", ".join(str(folder / name) for name in _json(splits).get("splits", []))
        raise DataError(f"{folder} is a data set of several splits: name those to read ({names})")
    if (state := folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        for each in _json(state).get("_data_files", []):
            yield Source(str(folder / each["filename"]), "arrow")
        return
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _in_folder(path)
        elif (kind := _kind(path)) is not None:
            yield Source(str(path), kind)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{path} is damaged: save the data set again") from None


def _decoded(data: bytes, path: Path, lines_before: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = lines_before + data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise DataError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8: convert the file to UTF-8") from None


def _texts(path: Path, split_on: str | None) -> Texts:
    size = path.stat().st_size
    if split_on is None or size == 0:
        yield _decoded(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), path, 0), size
        return
    at_blank_lines = split_on == BLANK_LINES
    # A pattern that begins with the byte it looks for is found several times as fast as one that begins with \r?.
    cut = rb"\n(?:[ \t]*\r?\n)+" if at_blank_lines else re.escape(split_on.encode())
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 3 if data[:3] == b"\xef\xbb\xbf" else 0
    for match in chain(re.finditer(cut, data), [None]):
        end, following = match.span() if match else (size, size)
        try:
            text = data[begin:end].decode()
        except UnicodeDecodeError:
            text = _decoded(data[begin:end], path, data[:begin].count(b"\n"))
        if text and not text.isspace():
            yield text.removesuffix("\r") if at_blank_lines else text, following
        begin = following


def _lines(path: Path, field: str) -> Texts:
    packed = path.name.lower().endswith(".gz")
    done = 0
    with path.open("rb") as raw, gzip.open(raw) if packed else raw as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                done = raw.tell() if packed else done + len(line)
                data = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not data.isspace():
                    yield _field(_decoded(data, path, number - 1), field, path, number), done
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise DataError(f"{path} is damaged or cut short after line {number}: fetch or make it again") from None


def _field(line: str, field: str, path: Path, number: int) -> str | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: no JSON ({error.msg}, column {error.colno}); mend the line") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: no JSON ({described(error)}); mend the line") from None
    if not isinstance(row, dict):
        raise DataError(f'{path}, line {number}: expected an object such as {{"{field}": ...}}; mend the line')
    if field not in row:
        raise DataError(f"{path}, line {number}: no field '{field}'{nearest(field, row)}; choose it with field=")
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{path}, line {number}: field '{field}' is no string but {type(text).__name__}")
    if text is not None and not text.isascii():
        _check_surrogates(text, path, number)
    return text


def _check_surrogates(text: str, path: Path, number: int) -> None:
    """JSON can spell half a surrogate pair, which is no text and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f"{path}, line {number}: \\u{code:04x} is half a surrogate pair; mend the line") from None


def _arrow(what: str) -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        raise RecollectError(f"reading {what} needs pyarrow: pip install 'recollect[lm]'") from None


def _table(source: Source, field: str) -> Texts:
    pa = _arrow(source.name)
    size = source.size
    try:
        if source.kind == "parquet":
            with pa.parquet.ParquetFile(source.name) as file:
                _check_column(file.schema_arrow, field, source.name)
                yield from _in_rows(_row_groups(file, field), source.name, size, file.metadata.num_rows)
        else:
            with pa.memory_map(source.name) as file, pa.ipc.open_stream(file) as stream:
                _check_column(stream.schema, field, source.name)
                columns = ((batch.column(field), file.tell()) for batch in stream)
                row = 0
                for column, done in columns:
                    yield from ((text, done) for text in _strings(column, source.name, row))
                    row += len(column)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source.name} is damaged or no {source.kind} file ({described(error)})") from None


def _row_groups(file: Any, field: str) -> Iterator[Any]:
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[field], use_threads=False):
            yield batch.column(0)


def _in_rows(columns: Iterator[Any], name: str, size: int, n_rows: int) -> Texts:
    """Texts of columns, where rows stand for bytes."""
    row = 0
    for column in columns:
        for i, text in enumerate(_strings(column, name, row), row + 1):
            yield text, size * i // n_rows
        row += len(column)


def _check_column(schema: Any, field: str, name: str) -> None:
    if field not in schema.names:
        raise DataError(f"{name}: no column '{field}'{nearest(field, schema.names)}; choose it with field=")
    types = _arrow(name).types
    kind = schema.field(field).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
        raise DataError(f"{name}: column '{field}' holds {kind}, not strings; choose another with field=")


def _strings(column: Any, name: str, row: int) -> list[str | None]:
    """Texts of an Arrow column that begins with ``row``."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for i, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}, row {row + i + 1}: byte 0x{error.object[error.start]:02x} is not UTF-8; mend the row"
                ) from None
        raise


def _hub_parts(name: str) -> tuple[str, str | None, str]:
    parts = name.removeprefix(HUB).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"'{name}' is not of the form datasets:NAME:SPLIT or datasets:NAME:CONFIG:SPLIT")
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1]


@lru_cache(maxsize=4)
def _load(name: str) -> Any:
    dataset, config, split = _hub_parts(name)
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise RecollectError(f"'{name}' needs datasets: pip install 'recollect[lm]'") from None
    try:
        return datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # of datasets, huggingface_hub and their HTTP client: no common base
        raise DataError(f"'{name}' cannot be loaded ({described(error).rstrip('. ')})") from None


def _hub(source: Source, field: str) -> Texts:
    dataset = _load(source.name)
    _check_column(dataset.data.schema, field, source.name)
    rows = dataset.select_columns([field]).with_format("arrow").iter(batch_size=BATCH_ROWS)
    yield from _in_rows((batch.column(field) for batch in rows), source.name, source.size, len(dataset))
