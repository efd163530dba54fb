"""Numbered things made ahead by processes of their own, and taken in order.

With n workers, worker w makes the items w, w + n, w + 2 n, ... in order and offers each through a pipe until it is
taken: at most two items per worker are in memory, one made and one on its way. A pipe ends when the process at its
other side does, however that happens: neither side can wait for the dead, and nothing is left to clean up.

Workers are spawned, not forked: safe beside threads. Each computes with one thread, sees no GPU, and leaves signals to
the process that started it.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import copy
from multiprocessing import get_context, parent_process
from multiprocessing.reduction import ForkingPickler
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from recollect.core.errors import RecollectError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
HELD_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""A terminal or a job manager sends these to all processes at once; whoever started the workers ends them."""

Make: TypeAlias = Callable[[int], Any]
"""The thing of a number."""


class WorkerDiedError(RecollectError):
    """A worker ended before its item was made; the text says how."""


@contextmanager
def made_ahead(build: Callable[[], Make], numbers: range, workers: int) -> Generator[Make]:
    """A function that takes the things of ``numbers``, which must be asked for in order, each once.

    Every worker calls ``build``, which must pickle, once and what it returns for each of its numbers. What is raised
    there is raised by the call that asks for that number, with the worker's traceback as its cause; WorkerDiedError
    when a worker was killed. All workers have ended when the context has.
    """
    pool = [_Worker(build, numbers[first::workers]) for first in range(min(workers, len(numbers)))]
    try:
        for worker in pool:
            worker.start()
        yield lambda number: pool[numbers.index(number) % len(pool)].take(number)
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """One process and our end of its pipe."""

    def __init__(self, build: Callable[[], Make], numbers: range) -> None:
        context = get_context("spawn")
        self._offers, self._theirs = context.Pipe(duplex=False)
        arguments = (build, numbers, self._theirs)
        self._process: SpawnProcess = context.Process(target=_work, args=arguments, daemon=True)

    def start(self) -> None:
        with _environment(WORKER_ENV), _signals_held():
            self._process.start()
        # Only the worker holds the writing end now, so that its end is the end of the pipe.
        self._theirs.close()

    def take(self, number: int) -> Any:
        try:
            made, offer = self._offers.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise WorkerDiedError(how) from None
        if isinstance(offer, _Failure):
            raise offer.error from _WorkerError(offer.trace)
        assert made == number, f"item {made} came for number {number}"
        return offer

    def end(self) -> None:
        self._offers.close()
        self._theirs.close()
        if self._process.pid is not None:
            # It holds nothing that this could harm: files are written atomically and locks end with their process.
            self._process.kill()
            self._process.join()
        self._process.close()


class _Failure(NamedTuple):
    error: Exception
    trace: str


class _WorkerError(Exception):
    """Shown as the cause of what a worker raised."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def _work(build: Callable[[], Make], numbers: range, offers: Connection) -> None:
    """What a worker does: build the maker, and offer what it makes one after the other."""
    for number in HELD_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _hold(signal.SIG_UNBLOCK)
    Thread(target=_end_with_parent, daemon=True).start()
    make = None
    for number in numbers:
        try:
            make = make or build()
            offer = ForkingPickler.dumps((number, make(number)))
        except Exception as error:
            offer = ForkingPickler.dumps((number, _Failure(portable(error), traceback.format_exc())))
            numbers = range(0)
        try:
            offers.send_bytes(offer)
        except OSError:  # nobody takes any more
            return
        if not numbers:
            return


def _end_with_parent() -> None:
    """Also in the middle of an item: a parent that was killed cannot say so."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def portable(error: Exception) -> Exception:
    """The error itself if it survives the way to another process, else its words."""
    try:
        ForkingPickler.dumps(copy(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _environment(values: dict[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _signals_held() -> Generator[None]:
    """A process inherits which signals are blocked: none may end a worker before it has come to ignore them."""
    before = _hold(signal.SIG_BLOCK)
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _hold(how: int) -> set[Any] | None:
    return signal.pthread_sigmask(how, HELD_SIGNALS) if hasattr(signal, "pthread_sigmask") else None
