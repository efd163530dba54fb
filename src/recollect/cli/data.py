"""``recollect data``: stores made, checked, shown, imported and exported."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from recollect.cli.data_arguments import DataCheck, DataCommand, DataExport, DataImport, DataMake, DataShow
from recollect.cli.progress import counting
from recollect.core.errors import ConfigError, DataError
from recollect.data import EpisodeStore


def data(command: DataCommand) -> int:
    """Carry out one of them; returns the exit code."""
    # A terminated command leaves as an interrupted one does: its worker processes end first. A shell that starts it in
    # the background has it ignore interrupts; who sends one all the same means it.
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _carry_out(command)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _carry_out(command: DataCommand) -> None:
    match command:
        case DataMake():
            _make(command)
        case DataCheck():
            _check(command)
        case DataShow():
            from recollect.data.showing import show

            name = f"{command.directory.resolve().name}-episode{command.episode}.png"
            store = EpisodeStore.open(command.directory)
            out = show(store, command.episode, command.out or Path(name), frames=command.frames, fps=command.fps)
            print(f"wrote {out}")
        case DataImport():
            from recollect.data.importing import import_memory_maze

            with counting(f"reading {command.source}") as progress:
                store = import_memory_maze(
                    command.source, command.out, command.split, progress, workers=_workers(command.workers)
                )
            print(described(store))
        case DataExport():
            from recollect.data.exporting import export_minari

            store = EpisodeStore.open(command.directory)
            with counting(f"writing {command.path}") as progress:
                written = export_minari(store, command.path, progress)
            print(f"wrote {written}")


def _make(command: DataMake) -> None:
    from recollect.core.config import override
    from recollect.data import collect
    from recollect.envs import find

    env = override(find(command.env), command.overrides)
    splits, counts = command.split, command.episodes
    if len(splits) != len(counts) or len(set(splits)) != len(splits):
        raise ConfigError(
            f"every split takes one number of episodes: --split {' '.join(splits)} and --episodes "
            f"{' '.join(map(str, counts))} do not fit"
        )
    for split, count in zip(splits, counts, strict=True):
        path = command.out if len(splits) == 1 else command.out / split
        started = time.monotonic()
        with counting(f"{path}: episodes") as progress:
            blocks = -(-max(count, 1) // env.block_episodes)
            workers = _workers(command.workers) if blocks > 1 or command.workers else 0
            store = collect(env, count, command.seed, path, split, progress, workers=workers, ray=command.ray)
        print(f"{described(store)}, {time.monotonic() - started:.1f} s")


def _check(command: DataCheck) -> None:
    from recollect.data.check import check, mend, ranges, stores_below

    failed: list[str] = []
    for path in stores_below(command.directory):
        if command.mend and (mended := mend(path)):
            print(f"{path}: {mended} {'block' if mended == 1 else 'blocks'} made again")
        with counting(f"{path}: blocks") as progress:
            report = check(path, progress)
        for problem in report.problems:
            print(f"{path}: {problem}")
        if report.sound:
            print(f"{path}: {report.n_episodes} episodes, {report.n_steps} frames, {_size(report.bytes)}: sound")
        else:
            bad = f"{len(report.bad)} of {report.n_episodes} episodes are bad"
            failed.append(f"{path}: {bad}{f' ({ranges(sorted(report.bad))})' if report.bad else ''}")
    if failed:
        hint = "" if command.mend else f"; what can be made again: recollect data check {command.directory} --mend"
        raise DataError("; ".join(failed) + hint)


def described(store: EpisodeStore) -> str:
    """A store in a line."""
    size = sum(spec["bytes"] for spec in store.meta["files"].values())
    return f"{store.path}: {store.n_episodes} episodes, {store.n_steps} frames, {_size(size)}"


def _workers(asked: int | None) -> int:
    return (os.cpu_count() or 1) if asked is None else asked


def _size(n_bytes: float) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if n_bytes >= 1000**power:
            return f"{n_bytes / 1000**power:.3g} {unit}"
    return f"{n_bytes:g} bytes"
