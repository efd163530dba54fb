"""Reading documents: every kind of source, in order, and what is wrong with one told with file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recollect.core.errors import ConfigError, DataError, RecollectError
from recollect.text import documents
from recollect.text.documents import Documents, find_sources, read_documents

TEXTS = ["first", "second\nwith a line", "drittes, größer", "  x  "]


def lines(path: Path, rows: list[Any]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def table(texts: list[str | None], field: str = "text", kind: Any = None) -> pa.Table:
    return pa.table({"id": range(len(texts)), field: pa.array(texts, kind or pa.string())})


def saved_dataset(folder: Path, shards: list[list[str | None]]) -> Path:
    """What ``datasets.Dataset.save_to_disk`` writes, as far as reading needs it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        rows = table(texts)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, rows.schema) as stream:
            stream.write_table(rows, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo é\n".encode())
    (tmp_path / "b.md").write_text("# title\n")
    assert list(read_documents(tmp_path)) == ["one\r\n\r\ntwo é\n", "# title\n"]
    assert [text[0] for text in read_documents([tmp_path / "b.md", str(tmp_path / "a.txt")])] == ["#", "o"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_files_split_at_blank_lines(tmp_path: Path, end: str) -> None:
    text = "\ufeff\n\none\nstill one\n\ntwo\n \t\n\n\n  three\n\n".replace("\n", end)
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert list(read_documents(tmp_path, split_on="blank-lines")) == [f"one{end}still one", "two", "  three"]


def test_text_files_split_at_a_string(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one.*two.*\n.*thrée\n\nmore.*")
    read = read_documents(tmp_path / "a.txt", split_on=".*")
    assert list(read) == ["one", "two", "thrée\n\nmore"]
    assert read.skipped == {"blank": 0, "short": 0}
    (tmp_path / "b.txt").write_text("no such string")
    assert list(read_documents(tmp_path / "b.txt", split_on="<|>")) == ["no such string"]
    with pytest.raises(ConfigError, match="split_on must not be empty"):
        read_documents(tmp_path, split_on="")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.NDJSON"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    path = lines(tmp_path / name, [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    assert list(read_documents(path)) == TEXTS
    assert list(read_documents(lines(path, [{"body": "x"}]), "body")) == ["x"]


def test_json_lines_may_have_blank_lines_a_mark_and_no_last_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b"}\n   \n{"text": "c"}')
    assert list(read_documents(path)) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: Any) -> None:
    texts = [f"{text} {i}" for i in range(300) for text in TEXTS]
    pq.write_table(table(texts, kind=kind), tmp_path / "a.parquet", row_group_size=500)
    assert list(read_documents(tmp_path)) == texts


def test_parquet_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one batch of rows is in memory as strings."""
    pq.write_table(table(["x"] * 1000), tmp_path / "a.parquet", row_group_size=300)
    sizes: list[int] = []
    strings = documents._strings
    monkeypatch.setattr(
        documents, "_strings", lambda column, *rest: sizes.append(len(column)) or strings(column, *rest)
    )
    assert len(list(read_documents(tmp_path))) == 1000
    assert sizes == [256, 44] * 3 + [100]


def test_a_saved_data_set_needs_no_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    saved_dataset(tmp_path / "d" / "train", [["a", "b", "c"], ["d"]])
    (tmp_path / "d" / "z.txt").write_text("e")
    assert list(read_documents(tmp_path / "d" / "train")) == ["a", "b", "c", "d"]
    assert list(read_documents(tmp_path / "d")) == ["a", "b", "c", "d", "e"]
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"of several splits: name those to read \(.*/d/train, .*/d/test\)"):
        read_documents(tmp_path / "d")


def test_folders_are_read_in_order_and_to_the_bottom(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "x.txt").write_text("2")
    lines(tmp_path / "c.jsonl", [{"text": "3"}])
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    assert list(read_documents(tmp_path)) == ["1", "2", "3"]
    assert list(read_documents([tmp_path / "c.jsonl", tmp_path / "b"])) == ["3", "2"]


def test_documents_left_out_are_counted_and_reading_again_counts_again(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": t} for t in ("", " \n", None, "ab", "abc", "äbc", "x")])
    read = read_documents(path, min_chars=3)
    for _ in range(2):
        assert list(read) == ["abc", "äbc"]
        assert (read.n_read, read.skipped) == (2, {"blank": 3, "short": 2})


def test_progress_counts_the_bytes_of_all_sources(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"text": "a"}] * 5)
    lines(tmp_path / "b.jsonl.gz", [{"text": "a"}] * 5)
    (tmp_path / "c.txt").write_text("x\n\nyyyy\n\nzz")
    pq.write_table(table(["p"] * 10), tmp_path / "d.parquet")
    saved_dataset(tmp_path / "e", [["q"] * 5])
    read = read_documents(tmp_path, split_on="blank-lines")
    assert read.total == sum(source.size for source in read.sources)
    done = [read.done for _ in read]
    assert done == sorted(done)
    assert len(set(done[:5])) == 5
    assert done[-1] <= read.done == read.total
    first = read.sources[0].size
    assert done[4] == first
    assert done[0] == first // 5


BAD_LINES = {
    '{"text": "a"': r"line 2: no JSON \(Expecting ',' delimiter, column \d+\); mend the line",
    '["text"]': "line 2: expected an object",
    '{"txt": "a"}': r"line 2: no field 'text'; did you mean 'txt'\?; choose it with field=",
    '{"text": 3}': "line 2: field 'text' is no string but int",
    '{"text": "\\ud800"}': "line 2: .ud800 is half a surrogate pair",
    "[" * 200_000: r"line 2: no JSON \(RecursionError",
    '{"text": ' + "9" * 5000 + "}": r"line 2: no JSON \(ValueError",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:12])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_bad_lines_are_named(tmp_path: Path, line: str, name: str) -> None:
    data = f'{{"text": "fine"}}\n{line}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(DataError, match=rf"{name}, {BAD_LINES[line]}") as error:
        list(read_documents(tmp_path))
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    cases: dict[str, tuple[bytes, str | None]] = {
        "a.txt": (b"one\ntwo\nthr\xe9e\n", None),
        "b.txt": (b"one\n\ntwo\xe9\n\nthree", "blank-lines"),
        "c.txt": (b"one;\ntwo;\n\xe9", ";"),
        "d.jsonl": (b'{"text": "a"}\n\n{"text": "\xe9"}', None),
    }
    for name, (data, split_on) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}, line 3: byte 0xe9 is not UTF-8: convert the file to UTF-8"):
            list(read_documents(tmp_path / name, split_on=split_on))
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0\x08\0\0\0"), pa.py_buffer(b"finecaf\xe9")]
    )
    pq.write_table(pa.table({"text": broken}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"e\.parquet, row 2: byte 0xe9 is not UTF-8; mend the row"):
        list(read_documents(tmp_path / "e.parquet"))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    packed = lines(tmp_path / "a.jsonl.gz", [{"text": f"{i}"} for i in range(9999)])
    data = packed.read_bytes()
    for damaged in (data[:-20], data[: len(data) // 2], data[:99] + bytes(200) + data[299:], b"not packed"):
        packed.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz(, line \d+: | is damaged or cut short after line \d+)"):
            list(read_documents(packed))
    texts = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(2000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet", compression="zstd")
    whole = (tmp_path / "b.parquet").read_bytes()
    for damaged in (b"", b"PAR1", whole[:-10], whole[:9000] + bytes(500) + whole[9500:]):
        (tmp_path / "b.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"b\.parquet is damaged or no parquet file") as error:
            list(read_documents(tmp_path / "b.parquet"))
        assert "\n" not in str(error.value)
    folder = saved_dataset(tmp_path / "c", [["a", "b", "c"]])
    shard = next(folder.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(DataError, match=r"c/data-.*\.arrow is damaged or no arrow file"):
        list(read_documents(folder))
    shard.unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow"):
        list(read_documents(folder))
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json is damaged"):
        read_documents(folder)


def test_columns_that_are_missing_or_no_text_are_named(tmp_path: Path) -> None:
    pq.write_table(table(["x"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'texts'; did you mean 'text'\?; choose it with field="):
        list(read_documents(tmp_path, "texts"))
    with pytest.raises(DataError, match=r"a\.parquet: column 'id' holds int64, not strings"):
        list(read_documents(tmp_path, "id"))


def test_sets_without_documents_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no document files in it; they end with \.txt"):
        read_documents(tmp_path)
    with pytest.raises(DataError, match="no source of documents"):
        read_documents([])
    with pytest.raises(DataError, match="no such file or folder of documents"):
        read_documents(tmp_path / "none.txt")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"a\.csv: unknown kind of file; documents are read from \.txt"):
        read_documents(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_text("")
    lines(tmp_path / "b.jsonl", [{"text": " "}, {"text": "no"}])
    with pytest.raises(
        DataError, match=r"no document in .*a\.txt, .*b\.jsonl: 2 blank, 1 short left out; give sources"
    ):
        list(read_documents(tmp_path, min_chars=3))


def test_pyarrow_is_asked_for_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(["x"]), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("y")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert list(read_documents(tmp_path / "b.txt")) == ["y"]
    with pytest.raises(RecollectError, match=r"needs pyarrow: pip install 'recollect\[lm\]'"):
        list(read_documents(tmp_path / "a.parquet"))


class FakeDataset:
    """What ``datasets.load_dataset`` returns, as far as it is used here."""

    _fingerprint = "f00"

    def __init__(self, rows: pa.Table) -> None:
        self.data = rows

    def __len__(self) -> int:
        return self.data.num_rows

    def select_columns(self, names: list[str]) -> FakeDataset:
        return FakeDataset(self.data.select(names))

    def with_format(self, kind: str) -> FakeDataset:
        assert kind == "arrow"
        return self

    def iter(self, batch_size: int) -> Any:
        return (self.data.slice(i, batch_size) for i in range(0, len(self), batch_size))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of a stand-in for ``datasets.load_dataset``."""
    calls: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> FakeDataset:
        calls.append((name, config, split))
        if name == "missing":
            raise ConnectionError("no way there.\nmore lines")
        return FakeDataset(table([f"{split} {i}" for i in range(300)], kind=pa.large_string()))

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    documents._load.cache_clear()
    return calls


def test_data_sets_by_name(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read = read_documents(["datasets:some/set:train", "datasets:other:config:test"])
    assert list(read) == [f"train {i}" for i in range(300)] + [f"test {i}" for i in range(300)]
    assert asked == [("some/set", None, "train"), ("other", "config", "test")]
    assert read.done == read.total > 0
    assert read.sources[0].digest() == "f00"
    with pytest.raises(DataError, match=r"^datasets:some/set:train: no column 'body'"):
        list(read_documents("datasets:some/set:train", "body"))
    with pytest.raises(DataError, match=r"cannot be loaded \(ConnectionError: no way there\)$"):
        read_documents("datasets:missing:train")
    for bad in ("datasets:", "datasets:name", "datasets:a:b:c:d", "datasets::train"):
        with pytest.raises(DataError, match="is not of the form datasets:NAME:SPLIT"):
            find_sources(bad)
    documents._load.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecollectError, match=r"needs datasets: pip install 'recollect\[lm\]'"):
        read_documents("datasets:some/set:train")


def test_reading_may_stop_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n\nb\n\nc")
    read: Documents = read_documents(tmp_path, split_on="blank-lines")
    assert next(iter(read)) == "a"
    assert list(read) == ["a", "b", "c"]
