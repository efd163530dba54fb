"""One run after the other in this very process: nothing to start, one model in memory, one thing to interrupt."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

from recollect.core.errors import described
from recollect.train.executors.base import POLL_S, Job, log_traceback
from recollect.train.loop import StoppedError, train
from recollect.train.runtime import resolve_device, stop_on_signals


class InProcess:
    """Trains a job inside ``poll``. An exception ends that run only; what kills the process ends all of them.

    The first SIGINT or SIGTERM lets the step end and writes a checkpoint, then raises KeyboardInterrupt.
    """

    slots: int | None = 1

    def __init__(self, device: str = "cpu") -> None:
        resolve_device(device)
        self.device = device
        self._job: Job | None = None

    def start(self, job: Job) -> None:
        """Take the job; ``poll`` trains it."""
        self._job, job.status = job, "running"

    def poll(self, tick: Callable[[], None]) -> None:
        """Train the job that was started, to its end."""
        job, self._job = self._job, None
        if job is None:
            return
        in_main = threading.current_thread() is threading.main_thread()
        with stop_on_signals() if in_main else nullcontext(lambda: False) as asked:
            ticking = _Ticking(job, tick, asked)
            try:
                train(job.run, job.where.path, device=self.device, stop=ticking)
            except StoppedError:
                job.status = "waiting"
            except Exception as error:
                log_traceback(job.where, error)
                job.fail(described(error))
            else:
                job.status = "finished"
            job.refresh()
            leaving = ticking.left or asked()
        _let_go(self.device)
        if leaving:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Nothing is under way between two calls."""


class _Ticking:
    """Whether to stop, asked after every step; shows the job now and then on the way."""

    def __init__(self, job: Job, tick: Callable[[], None], asked: Callable[[], bool]) -> None:
        self._job, self._tick, self._asked = job, tick, asked
        self._last = time.monotonic()
        self.left = False

    def __call__(self) -> bool:
        if time.monotonic() - self._last >= POLL_S:
            self._job.refresh()
            try:
                self._tick()
            except KeyboardInterrupt:
                # Whoever watches may interrupt as well as the keyboard: the step is done, a checkpoint comes first.
                self.left = True
            self._last = time.monotonic()
        self.left = self.left or self._asked()
        return self.left


def _let_go(device: str) -> None:
    """Free the model of the run that has ended before the next one is built."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
