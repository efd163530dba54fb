"""Many runs side by side: one process and one thread each, because two small models train faster apart than together.

Every run is ``recollect resume DIR`` on a directory that already holds its config, so it can be continued alone, and
a sweep that was stopped goes on where it was. A run that fails costs the others nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recollect.core.config import differences, dumps, to_dict
from recollect.core.errors import ConfigError, RunError
from recollect.core.files import write_atomically
from recollect.train.directory import RunDirectory, read_json
from recollect.train.metrics import read_metrics
from recollect.train.run import FaceOff, RunConfig
from recollect.train.runtime import REEXECUTED, SWEEP_COMMAND, SWEEP_PID, allocator_env, own_command

POLL_S = 0.25
GRACE_S = 30.0
"""How long a child may take to finish its step and write a checkpoint when the sweep is stopped."""

Status = Literal["waiting", "running", "finished", "failed"]


@dataclass
class Job:
    """One run of a sweep, as its directory shows it."""

    run: RunConfig
    where: RunDirectory
    status: Status = "waiting"
    error: str = ""
    step: int = 0
    loss: float | None = None
    headline: float | None = None
    steps_per_s: float | None = None
    elapsed_s: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.where.path / "log.txt"

    @property
    def left_s(self) -> float | None:
        """Seconds of training left: by the speed of the last steps, and no more than the time limit allows."""
        if self.steps_per_s is None or self.steps_per_s <= 0:
            return None
        left = (self.run.train.steps - self.step) / self.steps_per_s
        limit = self.run.train.time_limit_s
        return max(0.0, left if limit is None else min(left, limit - self.elapsed_s))

    def refresh(self) -> None:
        """Read the newest lines of ``metrics.jsonl``."""
        for record in read_metrics(self.where.metrics, tail_bytes=8192):
            self.step = max(self.step, record["step"])
            self.loss = record.get("loss", self.loss)
            self.headline = record.get("headline", self.headline)
            self.steps_per_s = record.get("steps_per_s", self.steps_per_s)
            self.elapsed_s = record.get("elapsed_s", self.elapsed_s)


Display = Callable[[Sequence[Job]], None]


def run_faceoff(
    faceoff: FaceOff,
    directory: Path,
    *,
    workers: int | None = None,
    device: str = "cpu",
    display: Display | None = None,
) -> list[Job]:
    """Train every run of ``faceoff`` below ``directory``, ``workers`` at a time (default: one per CPU core).

    Returns all jobs, finished or failed. ``display`` is called several times a second. Raises RunError before anything
    starts when the directory holds other configs, and passes KeyboardInterrupt on once every child has ended.
    """
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    jobs = prepare(faceoff, directory)
    show = display or (lambda _: None)
    waiting = [job for job in longest_first(jobs) if job.status == "waiting"]
    running: list[Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_start(waiting.pop(0), device))
            time.sleep(POLL_S)
            for job in running:
                _watch(job)
            running = [job for job in running if job.status == "running"]
            show(jobs)
    finally:
        _stop(running)
    return jobs


def prepare(faceoff: FaceOff, directory: Path) -> list[Job]:
    """Write ``faceoff.json`` and every run's config, and find out which runs are finished already.

    Raises RunError naming the keys that differ when the directory holds another face-off. More seeds may be added.
    """
    path = directory / "faceoff.json"
    if path.exists():
        old, new = read_json(path), json.loads(json.dumps(to_dict(faceoff)))
        changed = differences(old.get("runs"), new["runs"], "runs")
        if changed:
            what = "; ".join(changed[:3])
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise RunError(f"{directory} holds another face-off ({what}{more}); choose another --out or delete it")
    jobs = [Job(run, RunDirectory(directory / run.name)) for run in faceoff.expanded()]
    for job in jobs:
        job.where.claim(job.run)
        job.refresh()
        if job.where.finished(job.run) is not None:
            job.status = "finished"
    write_atomically(path, dumps(faceoff).encode())
    return jobs


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    """The order to start in, so that no long run is left for the end: by expected wall time, unknown ones first.

    What is known: the time a finished seed of the same row took, else the row's time limit.
    """
    took = {
        (job.run.group, job.run.row): float(read_json(job.where.results)["wall_s"])
        for job in jobs
        if job.status == "finished"
    }

    def expected(job: Job) -> tuple[float, int]:
        known = took.get((job.run.group, job.run.row), job.run.train.time_limit_s)
        return (float("inf") if known is None else known, job.run.train.steps)

    return sorted(jobs, key=expected, reverse=True)


def _start(job: Job, device: str) -> Job:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {**allocator_env(os.environ), REEXECUTED: "1"}
    environment |= {SWEEP_PID: str(os.getpid()), SWEEP_COMMAND: own_command()}
    command = [sys.executable, "-m", "recollect", "resume", str(job.where.path), "--device", device]
    with job.log.open("ab") as log:
        # A session of its own, so that Ctrl-C reaches the children through us, once, and in order.
        job.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    job.status = "running"
    return job


def _watch(job: Job) -> None:
    code = job.process.poll() if job.process else None
    job.refresh()
    if code is None:
        return
    job.status = "finished" if code == 0 and job.where.results.exists() else "failed"
    if job.status == "failed":
        lines = job.log.read_text(errors="replace").strip().splitlines()
        killed = f"killed by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        job.error = lines[-1].removeprefix("recollect: ") if lines and code > 0 else killed


def _stop(jobs: Sequence[Job]) -> None:
    processes = [job.process for job in jobs if job.process is not None]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
