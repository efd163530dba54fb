"""The token store: what it holds, that it is whole or not there, and what reuse and damage say."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.core.errors import ConfigError, DataError, RecollectError
from recollect.core.files import lock_directory
from recollect.text import store as store_module
from recollect.text.documents import Source
from recollect.text.store import Progress, TokenStore, build_store, open_store
from recollect.text.tokenizer import ByteTokenizer, EncodedDocuments

BYTES = ByteTokenizer()


class WideTokenizer(ByteTokenizer):
    """Two tokens for every byte, from a vocabulary that needs 32 bits."""

    vocab_size = 100_000
    eos_id = 99_999
    fingerprint = "wide"  # type: ignore[assignment]

    def encode_documents(self, texts: Any) -> EncodedDocuments:
        documents = [np.append(np.repeat(list(text.encode()), 2) + 70_000, self.eos_id) for text in texts]
        lengths = np.array([len(document) for document in documents])
        return EncodedDocuments(np.concatenate(documents).astype(np.uint32), lengths)


def texts_of(n: int) -> list[str]:
    return [f"document {i} " + "é word " * (i * 7 % 23) for i in range(n)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_of(200)))
    return path


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks from little text, in this process."""
    monkeypatch.setattr(store_module, "BLOCK_CHARS", 500)


def file_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("source"))


def test_documents_come_back_as_they_went_in(source: Path, tmp_path: Path, small_blocks: None) -> None:
    store = build_store(source, tmp_path / "store", BYTES)
    texts = texts_of(200)
    assert [BYTES.decode(store.document(i)[:-1]) for i in range(store.n_documents)] == texts
    assert all(store.document(i)[-1] == 256 for i in range(200))
    assert store.lengths.tolist() == [len(text.encode()) + 1 for text in texts]
    assert store.n_tokens == len(store.tokens) == store.lengths.sum()
    assert store.tokens.dtype == np.uint16
    assert np.load(tmp_path / "store" / "tokens.npy").tolist() == store.tokens.tolist()
    assert (store.vocab_size, store.eos_id, store.tokenizer_name) == (257, 256, "bytes")
    assert store.skipped == {"blank": 0, "short": 0, "with few tokens": 0}
    told = store.meta["sources"][0]
    assert (told["name"], told["bytes"]) == (str(source), source.stat().st_size)
    assert told["sha256"] == Source(str(source), "lines").digest()
    assert left_in(tmp_path) == ["store"]
    with pytest.raises(DataError, match=r"document numbers lie in 0\.\.199, got 200"):
        store.document(200)
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 1


def test_wide_vocabularies_take_32_bits(source: Path, tmp_path: Path) -> None:
    store = build_store(source, tmp_path / "store", WideTokenizer())
    assert store.tokens.dtype == np.uint32
    assert store.document(3)[:3].tolist() == [70_100, 70_100, 70_111]
    assert store.document(3)[-1] == 99_999


def test_any_number_of_workers_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    text = "long enough for blocks " * 9000
    many = tmp_path / "source2.jsonl"
    many.write_text("".join(json.dumps({"text": f"{i} {text}" if i % 3 else ""}) + "\n" for i in range(30)))
    made: dict[int, dict[str, bytes]] = {}
    for workers in (0, 1, 3):
        told: list[Progress] = []
        build_store(
            [source, many],
            tmp_path / "store",
            BYTES,
            workers=workers,
            min_tokens=20,
            valid_share=0.1,
            progress=told.append,
        )
        made[workers] = file_bytes(tmp_path / "store")
        shutil.rmtree(tmp_path / "store")
        assert len(told) > 4
        assert told == sorted(told)
        assert told[-1].done == told[-1].total == source.stat().st_size + many.stat().st_size
        skipped = json.loads(made[workers]["meta.json"])["skipped"]
        assert skipped["blank"] == 10
        assert skipped["with few tokens"] > 0
    assert made[0] == made[1] == made[3]
    assert not active_children()


def test_short_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "source.txt").write_text("a\n\nbb\n\nccc\n\ndddd\n\neeeee")
    store = build_store(
        tmp_path / "source.txt", tmp_path / "s", BYTES, split_on="blank-lines", min_chars=2, min_tokens=4
    )
    assert [BYTES.decode(store.document(i)[:-1]) for i in range(3)] == ["ccc", "dddd", "eeeee"]
    assert store.n_documents == 3
    assert store.skipped == {"blank": 0, "short": 1, "with few tokens": 1}
    with pytest.raises(DataError, match="no document is left to store: 5 with few tokens left out; lower min_tokens"):
        build_store(tmp_path / "source.txt", tmp_path / "t", BYTES, split_on="blank-lines", min_tokens=40)
    assert left_in(tmp_path) == ["s"]


def test_held_out_documents_are_a_share_that_seed_and_number_decide(tmp_path: Path) -> None:
    (tmp_path / "source.txt").write_text("\n\n".join(f"{i}" for i in range(5000)))
    stores = {}
    for seed in (0, 1):
        store = build_store(tmp_path, tmp_path / f"s{seed}", BYTES, split_on="blank-lines", valid_share=0.1, seed=seed)
        train, valid = store.split("train"), store.split("valid")
        assert sorted([*train, *valid]) == store.split("all").tolist() == list(range(5000))
        assert 430 < len(valid) < 570
        assert np.abs(np.histogram(valid, 5, (0, 5000))[0] - 100).max() < 50
        assert np.array_equal(open_store(tmp_path / f"s{seed}").split("valid"), valid)
        stores[seed] = set(valid.tolist())
    assert len(stores[0] & stores[1]) < 120
    assert store_module._held_out(1000, 0.1, 0).tolist()[:900] == store_module._held_out(900, 0.1, 0).tolist()


def test_both_parts_of_a_split_have_documents(tmp_path: Path) -> None:
    for share in (1e-9, 0.999999):
        for seed in range(20):
            assert 1 <= store_module._held_out(2, share, seed).sum() <= 1
    (tmp_path / "source.txt").write_text("one document")
    with pytest.raises(DataError, match=r"one document cannot be shared out: split it \(split_on\) or hold none out"):
        build_store(tmp_path / "source.txt", tmp_path / "s", BYTES, valid_share=0.1)
    assert left_in(tmp_path) == []
    store = build_store(tmp_path / "source.txt", tmp_path / "s", BYTES)
    assert store.split("train").tolist() == [0]
    with pytest.raises(ConfigError, match="holds no documents out: build it with a valid_share"):
        store.split("valid")


def test_a_finished_store_is_used_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_store(source, tmp_path / "store", BYTES, valid_share=0.1)
    before = file_bytes(tmp_path / "store")

    def fail(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(ByteTokenizer, "encode_documents", fail)
    assert isinstance(build_store(source, tmp_path / "store", BYTES, valid_share=0.1, workers=2), TokenStore)
    os.utime(source, (1, 1))  # written again, with the same bytes
    build_store(source, tmp_path / "store", BYTES, valid_share=0.1)
    monkeypatch.chdir(tmp_path)
    build_store(source.relative_to(tmp_path), Path("store"), BYTES, valid_share=0.1)
    elsewhere = tmp_path / "moved.jsonl"
    source.rename(elsewhere)
    build_store(elsewhere, tmp_path / "store", BYTES, valid_share=0.1)
    assert file_bytes(tmp_path / "store") == before


def test_a_store_of_something_else_is_never_used(source: Path, tmp_path: Path) -> None:
    build_store(source, tmp_path / "store", BYTES)
    before = file_bytes(tmp_path / "store")
    end = r"\): remove it or choose another folder"
    others: list[tuple[str, dict[str, Any]]] = [
        (r"settings\.min_tokens: 0 -> 5", {"min_tokens": 5}),
        (r"settings\.valid_share: 0\.0 -> 0\.5", {"valid_share": 0.5}),
        (r"settings\.split_on: None -> ;", {"split_on": ";"}),
        (r"tokenizer\.eos_id: 256 -> 99999", {"tokenizer": WideTokenizer()}),
    ]
    for why, changed in others:
        with pytest.raises(DataError, match=rf"store holds other tokens \({why}{end}"):
            build_store(source, tmp_path / "store", **{"tokenizer": BYTES, **changed})
    (tmp_path / "source2.txt").write_text("more")
    with pytest.raises(DataError, match=rf"sources: .*source.jsonl -> .*source.jsonl, .*source2.txt{end}"):
        build_store([source, tmp_path / "source2.txt"], tmp_path / "store", BYTES)
    other = tmp_path / "other.jsonl"
    other.write_text(source.read_text().replace("document 7", "document 9"))  # as large, written as early
    os.utime(other, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
    with pytest.raises(DataError, match=rf"sources: .*source.jsonl -> .*other.jsonl{end}"):
        build_store(other, tmp_path / "store", BYTES)
    source.write_text(other.read_text())
    with pytest.raises(DataError, match=rf"source\.jsonl has changed since{end}"):
        build_store(source, tmp_path / "store", BYTES)
    assert file_bytes(tmp_path / "store") == before


def test_settings_that_cannot_be(source: Path, tmp_path: Path) -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="valid_share must be at least 0 and below 1"):
            build_store(source, tmp_path / "store", BYTES, valid_share=share)
    with pytest.raises(ConfigError, match="workers must not be negative"):
        build_store(source, tmp_path / "store", BYTES, workers=-1)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_leaves_nothing(source: Path, tmp_path: Path, workers: int) -> None:
    with source.open("a") as file:
        file.write('{"text": 1}\n')
    with pytest.raises(DataError, match="line 201: field 'text' is no string but int"):
        build_store(source, tmp_path / "store", BYTES, workers=workers)
    assert left_in(tmp_path) == []
    assert not active_children()


def test_a_build_can_be_stopped(source: Path, tmp_path: Path, small_blocks: None) -> None:
    asked: list[int] = []
    with pytest.raises(RecollectError, match=r"store: stopped after \d+ documents; nothing was kept"):
        build_store(source, tmp_path / "store", BYTES, stop=lambda: asked.append(1) or len(asked) == 3)
    assert len(asked) == 3

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    for workers in (0, 1):
        with pytest.raises(KeyboardInterrupt) as held:
            build_store(source, tmp_path / "store", BYTES, progress=interrupt, workers=workers)
        assert left_in(tmp_path) == []
        assert held.value.__traceback__ is not None
        assert not active_children()  # although the traceback still refers to what started them


def test_a_full_disk_ends_in_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"store\.partial cannot be written: No space left on device; nothing was kept"):
        build_store(source, tmp_path / "store", BYTES)
    assert left_in(tmp_path) == []


SLOW_BUILD = """
import sys, time
from recollect.text import store
from recollect.text.tokenizer import ByteTokenizer

def progress(told):
    print(told.documents, flush=True)
    time.sleep(0.005)

store.BLOCK_CHARS = 200
store.build_store(sys.argv[1], sys.argv[2], ByteTokenizer(), progress=progress)
"""


def test_a_kill_leaves_a_whole_store_or_none(source: Path, tmp_path: Path) -> None:
    for kill_after in (1, 30, 57):
        command = [sys.executable, "-c", SLOW_BUILD, str(source), str(tmp_path / "store")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(kill_after):
            process.stdout.readline()
        if kill_after == 30:
            with pytest.raises(DataError, match="is being written by another process: let it finish"):
                build_store(source, tmp_path / "store", BYTES)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert left_in(tmp_path) == ["store.partial"]
        with pytest.raises(DataError, match="store is unfinished: run the command that was building it again"):
            open_store(tmp_path / "store")
    again = build_store(source, tmp_path / "store", BYTES)
    assert again.n_documents == 200
    assert left_in(tmp_path) == ["store"]


def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    many = tmp_path / "source2.txt"
    many.write_text("a few words\n\n" * 1_000_000)

    def kill(_: Progress) -> None:
        for child in active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
        time.sleep(0.05)

    with pytest.raises(
        DataError, match=r"a process that tokenised for .*store was killed by signal SIGKILL; nothing was"
    ):
        build_store(many, tmp_path / "store", BYTES, split_on="blank-lines", workers=1, progress=kill)
    assert left_in(tmp_path) == []


def test_two_builds_do_not_meet(source: Path, tmp_path: Path) -> None:
    (tmp_path / "store.partial").mkdir()
    unlock = lock_directory(tmp_path / "store.partial")
    with pytest.raises(DataError, match=r"store\.partial is being written by another process: let it finish"):
        build_store(source, tmp_path / "store", BYTES)
    unlock()
    (tmp_path / "store.partial" / "tokens.npy").write_text("left by a kill")
    (tmp_path / "store.partial" / "diary.txt").write_text("mine")
    with pytest.raises(DataError, match=r"store\.partial holds something else \(diary\.txt\): remove it or choose"):
        build_store(source, tmp_path / "store", BYTES)
    assert (tmp_path / "store.partial" / "diary.txt").read_text() == "mine"
    (tmp_path / "store.partial" / "diary.txt").unlink()
    (tmp_path / "store.partial" / ".meta.json.7.partial").write_text("left by a kill")
    assert build_store(source, tmp_path / "store", BYTES).n_documents == 200
    assert sorted(file_bytes(tmp_path / "store")) == ["meta.json", "offsets.npy", "tokens.npy"]


def test_damage_is_told_in_one_line(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    build_store(source, folder, BYTES)
    whole = file_bytes(folder)

    def damaged(name: str, data: bytes | None, why: str, verify: bool = False) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for each, content in (whole | {name: data}).items():
            if content is not None:
                (folder / each).write_bytes(content)
        with pytest.raises(DataError, match=why) as error:
            open_store(folder, verify=verify)
        assert "\n" not in str(error.value)

    tokens, offsets, meta = whole["tokens.npy"], whole["offsets.npy"], json.loads(whole["meta.json"])
    damaged("tokens.npy", None, r"tokens\.npy is missing: remove .*store and build it again")
    damaged("tokens.npy", tokens[:-1], r"tokens\.npy is damaged: \d+ bytes, expected \d+; remove")
    damaged("tokens.npy", b"x" + tokens[1:], r"tokens\.npy is damaged: its header cannot be read")
    damaged("tokens.npy", tokens.replace(b"<u2", b"<i2"), r"tokens\.npy is damaged: its header differs from meta\.json")
    damaged(
        "tokens.npy", tokens[:-9] + b"!" + tokens[-8:], r"tokens\.npy is damaged: its checksum differs", verify=True
    )
    damaged("offsets.npy", offsets[:-8] + bytes(8), "store is damaged: its files do not fit together")
    swapped = offsets[:136] + offsets[144:152] + offsets[136:144] + offsets[152:]
    damaged("offsets.npy", swapped, "store is damaged: its files do not fit together")
    damaged("meta.json", None, r"store is not a token store: it has no meta\.json")
    damaged("meta.json", b"{", r"meta\.json is damaged: remove .*store and build it again")
    for key in ("tokenizer", "files", "n_tokens", "settings"):
        lacking = json.dumps({k: v for k, v in meta.items() if k != key}).encode()
        damaged("meta.json", lacking, r"meta\.json is damaged: remove")
    damaged("meta.json", json.dumps({**meta, "schema": 99}).encode(), "has schema 99, this version reads 1")
    damaged("meta.json", json.dumps({**meta, "n_documents": 3}).encode(), "its files do not fit together")
    with pytest.raises(DataError, match="no such token store; build it first"):
        open_store(tmp_path / "none")


def test_verify_passes_what_is_whole(source: Path, tmp_path: Path) -> None:
    build_store(source, tmp_path / "store", BYTES)
    assert open_store(tmp_path / "store", verify=True).n_documents == 200


def test_another_tokenizer_is_refused(source: Path, tmp_path: Path) -> None:
    store = build_store(source, tmp_path / "store", BYTES)
    store.check_tokenizer(ByteTokenizer())
    with pytest.raises(DataError, match=r"was made with tokenizer 'bytes' \([0-9a-f]{12}\), not with 'bytes' \(wide\)"):
        store.check_tokenizer(WideTokenizer())
