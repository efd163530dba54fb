"""Several runs side by side on this machine: one process and one thread each.

Two small models train faster apart than together, and a process that is killed takes no other with it. Every run is
``recollect resume DIR`` on a directory that already holds its config, so it can be continued alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from recollect.core.errors import ConfigError
from recollect.train.executors.base import GRACE_S, POLL_S, Job
from recollect.train.runtime import REEXECUTED, SWEEP_COMMAND, SWEEP_PID, allocator_env, own_command


class Processes:
    """Up to ``workers`` child processes. They notice when this process is gone, write a checkpoint and end."""

    def __init__(self, workers: int, device: str = "cpu") -> None:
        if workers < 1:
            raise ConfigError(f"workers must be at least 1, got {workers}")
        self.slots: int | None = workers
        self.device = device
        self.running: list[tuple[Job, subprocess.Popen[bytes]]] = []

    def start(self, job: Job) -> None:
        """Start the job's process; what it prints goes to its ``log.txt``."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {**allocator_env(os.environ), REEXECUTED: "1"}
        environment |= {SWEEP_PID: str(os.getpid()), SWEEP_COMMAND: own_command()}
        command = [sys.executable, "-m", "recollect", "resume", str(job.where.path), "--device", self.device]
        with job.log.open("ab") as log:
            # A session of its own, so that Ctrl-C reaches the children through us, once, and in order.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        job.status = "running"
        self.running.append((job, process))

    def poll(self, tick: Callable[[], None]) -> None:
        """Wait a moment, then look at every process."""
        del tick
        time.sleep(POLL_S)
        for job, process in self.running:
            code = process.poll()
            job.refresh()
            if code is not None:
                _end(job, code)
        self.running = [(job, process) for job, process in self.running if job.status == "running"]

    def stop(self) -> None:
        """Ask every process to end, wait for its checkpoint, and kill those that take longer than ``GRACE_S``."""
        for _, process in self.running:
            process.terminate()
        deadline = time.monotonic() + GRACE_S
        for job, process in self.running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            job.status = "waiting"
        self.running = []


def _end(job: Job, code: int) -> None:
    if code == 0 and job.where.results.exists():
        job.status = "finished"
        return
    lines = job.log.read_text(errors="replace").strip().splitlines()
    killed = f"killed by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    job.fail(lines[-1].removeprefix("recollect: ") if lines and code > 0 else killed)
