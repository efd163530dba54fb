"""Batches made ahead by processes of their own.

A batch is addressed by its step, so it does not matter who makes it: with n workers, worker w makes the steps
first + w, first + w + n, ... in order and offers each through a pipe until it is taken. A pipe ends when the process at
its other side does, however that happens: neither side can wait for the dead, and nothing is left to clean up.

Workers are spawned, not forked: safe beside threads, and they build the problem from its config. Each computes with one
thread, sees no GPU, and leaves signals to the process that started it.
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
from typing import TYPE_CHECKING, Any, NamedTuple

from recollect.core.errors import ConfigError, RunError
from recollect.core.seeding import Streams

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    import numpy as np
    import torch
    from torch import Tensor

    from recollect.train.problem import Problem
    from recollect.train.run import ProblemConfig, RunConfig

WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
HELD_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""A terminal or a job manager sends these to all processes at once; the run ends its workers itself."""

Take = Callable[[int], Any]
"""The batch of a step, on the run's device. Steps must be asked for in order, each once."""


def check_workers(workers: int) -> None:
    """Raise ConfigError when there cannot be that many."""
    if workers < 0:
        raise ConfigError(f"--data-workers must not be negative, got {workers}; 0 makes batches in the process itself")


@contextmanager
def batches(run: RunConfig, problem: Problem, first: int, device: torch.device, workers: int) -> Generator[Take]:
    """Batches of the steps from ``first`` on: made here, or ahead of time by ``workers`` processes. The same bits.

    What a worker raises is raised by the call that asks for that batch; RunError there when a worker was killed. All
    workers have ended when the context has.
    """
    import torch

    from recollect.train.batches import to_device

    steps = range(first, run.train.steps + 1)
    streams, cpu = Streams(run.seed), torch.device("cpu")
    if workers == 0 or not steps:
        yield lambda step: to_device(problem.batch(step, streams, cpu), device)
        return
    pool = [_Worker(run.problem, run.seed, steps[start::workers]) for start in range(min(workers, len(steps)))]
    try:
        for worker in pool:
            worker.start()
        yield lambda step: to_device(pool[(step - first) % len(pool)].take(step), device)
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """One process and our end of its pipe."""

    def __init__(self, config: ProblemConfig, seed: int, steps: range) -> None:
        context = get_context("spawn")
        self._offers, self._theirs = context.Pipe(duplex=False)
        arguments = (config, seed, steps, self._theirs)
        self._process: SpawnProcess = context.Process(target=_work, args=arguments, daemon=True)

    def start(self) -> None:
        with _environment(WORKER_ENV), _signals_held():
            self._process.start()
        # Only the worker holds the writing end now, so that its end is the end of the pipe.
        self._theirs.close()

    def take(self, step: int) -> Any:
        from recollect.train.batches import map_leaves

        try:
            made, offer = self._offers.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise RunError(
                f"the data worker that was to make the batch of step {step} {how}; the last checkpoint is kept: run "
                f"the same command again, with --data-workers 0 if this goes on"
            ) from None
        if isinstance(offer, _Failure):
            raise offer.error from _WorkerError(offer.trace)
        assert made == step, f"batch {made} came for step {step}"
        return map_leaves(offer, _unpacked)

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


class _Packed:
    """A tensor as bytes of its own: torch would pass a handle to shared memory, which dies with its process."""

    def __init__(self, tensor: Tensor) -> None:
        import torch

        self.dtype, self.shape = tensor.dtype, tensor.shape
        self.data: np.ndarray[Any, Any] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()

    def tensor(self) -> Tensor:
        import torch

        if not self.data.size:  # numpy gives what is empty a stride that torch cannot view as another type
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.from_numpy(self.data).view(self.dtype).view(self.shape)


def _work(config: ProblemConfig, seed: int, steps: range, offers: Connection) -> None:
    """What a worker does: build the problem, and offer its batches one after the other."""
    for number in HELD_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _hold(signal.SIG_UNBLOCK)
    Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from recollect.train.batches import map_leaves

    torch.set_num_threads(1)
    streams, cpu = Streams(seed), torch.device("cpu")
    problem = None
    for step in steps:
        try:
            problem = problem or config.build()
            offer = ForkingPickler.dumps((step, map_leaves(problem.batch(step, streams, cpu), _packed)))
        except Exception as error:
            offer = ForkingPickler.dumps((step, _Failure(_portable(error), traceback.format_exc())))
            steps = range(0)
        try:
            offers.send_bytes(offer)
        except OSError:  # the run has ended
            return
        if not steps:
            return


def _end_with_parent() -> None:
    """Also in the middle of a batch: a parent that was killed cannot say so."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _packed(leaf: Any) -> Any:
    import torch

    return _Packed(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _unpacked(leaf: Any) -> Any:
    return leaf.tensor() if isinstance(leaf, _Packed) else leaf


def _portable(error: Exception) -> Exception:
    """The error itself if it survives the way to another process."""
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
