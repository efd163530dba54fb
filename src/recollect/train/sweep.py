"""Every run of a face-off: which there are, which are finished, which comes next. Where they run is an ``Executor``'s.

A face-off that was stopped goes on where it was. A run that fails costs the others nothing and is named at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from recollect.core.config import differences, dumps, to_dict
from recollect.core.errors import ConfigError, RecollectError, RunError, described
from recollect.core.files import write_atomically
from recollect.train.directory import OtherRunError, RunDirectory, read_json
from recollect.train.executors.base import Executor, Job
from recollect.train.problem import Counting
from recollect.train.run import FaceOff

Display = Callable[[Sequence[Job]], None]


def run_faceoff(
    faceoff: FaceOff,
    directory: Path,
    *,
    workers: int | None = None,
    ray: str | None = None,
    device: str = "cpu",
    display: Display | None = None,
) -> list[Job]:
    """Train every run of ``faceoff`` below ``directory`` that has not finished.

    One after the other in this process; in ``workers`` processes side by side; or on the Ray cluster at address
    ``ray`` (empty: see ``recollect.train.executors.cluster``). Returns all jobs, finished or failed. ``display`` is
    called several times a second. Raises RunError before anything starts when the directory holds another face-off,
    and passes KeyboardInterrupt on once every run that was under way has left its checkpoint.
    """
    executor = executor_for(workers, ray, device)
    jobs = prepare(faceoff, directory)
    waiting = [job for job in jobs if job.status == "waiting"]
    if executor.slots != 1:
        waiting = longest_first(jobs)
    show = display or (lambda _: None)
    try:
        while waiting or any(job.under_way for job in jobs):
            while waiting and (executor.slots is None or sum(job.under_way for job in jobs) < executor.slots):
                job = waiting.pop(0)
                try:
                    executor.start(job)
                except OSError as error:
                    job.fail(described(error))
            show(jobs)
            if any(job.under_way for job in jobs):
                executor.poll(lambda: show(jobs))
        show(jobs)
    finally:
        executor.stop()
    return jobs


def make_data(faceoff: FaceOff, directory: Path, counting: Counting, workers: int = 0) -> None:
    """Make the data that unfinished runs read from disk, in ``workers`` processes, where it is not there yet.

    The runs would make it themselves, one process at a time and without a word. Raises RunError as ``run_faceoff``.
    """
    for job in prepare(faceoff, directory):
        if job.status == "waiting":
            # What cannot be made here cannot be made in the run either, and there it is told.
            with suppress(RecollectError, OSError):
                job.run.problem.build().make_data(counting, workers)


def executor_for(workers: int | None, ray: str | None, device: str) -> Executor:
    """The executor that these settings ask for: this process when they ask for none."""
    if workers is not None and ray is not None:
        raise ConfigError("--workers and --ray exclude each other: Ray runs as many at a time as the cluster has room")
    if ray is not None:
        from recollect.train.executors.cluster import Cluster

        return Cluster(ray, device)
    if workers is not None:
        from recollect.train.executors.processes import Processes

        return Processes(workers, device)
    from recollect.train.executors.in_process import InProcess

    return InProcess(device)


def prepare(faceoff: FaceOff, directory: Path) -> list[Job]:
    """Write ``faceoff.json`` and every run's config, and find out which runs are finished already.

    A run whose directory is damaged is marked failed. Raises RunError naming the keys that differ when the directory
    holds another face-off. Seeds and learning rates may be added.
    """
    path = directory / "faceoff.json"
    if path.exists():
        _refuse_another(read_json(path), faceoff, directory)
    runs = faceoff.expanded()
    jobs = [Job(run, RunDirectory(directory / faceoff.place(run)), faceoff.place(run)) for run in runs]
    for job in jobs:
        try:
            job.where.claim(job.run)
            if job.where.finished(job.run) is not None:
                job.status = "finished"
        except OtherRunError:
            raise
        except RecollectError as error:
            job.fail(str(error))
        job.refresh()
    write_atomically(path, dumps(faceoff).encode())
    return jobs


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    """The waiting jobs in the order to start in, so that no long run is left for the end: unknown ones first.

    Ordered by expected wall time: what a finished run of the same row took, else the row's time limit.
    """
    took: dict[tuple[str, str], float] = {}
    for job in jobs:
        if job.status == "finished":
            wall_s = read_json(job.where.results).get("wall_s")
            if isinstance(wall_s, (int, float)):
                took[job.run.group, job.run.row] = float(wall_s)

    def expected(job: Job) -> tuple[float, int]:
        known = took.get((job.run.group, job.run.row), job.run.train.time_limit_s)
        return (float("inf") if known is None else known, job.run.train.steps)

    return sorted((job for job in jobs if job.status == "waiting"), key=expected, reverse=True)


def _refuse_another(old: Any, faceoff: FaceOff, directory: Path) -> None:
    if not isinstance(old, dict):
        raise RunError(f"{directory / 'faceoff.json'} is not a JSON object; delete it and run the same command again")
    new = json.loads(json.dumps(to_dict(faceoff)))
    changed = differences(old.get("runs"), new["runs"], "runs")
    if changed:
        what = "; ".join(changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise RunError(f"{directory} holds another face-off ({what}{more}); choose another --out or delete it")
    tried = [float(lr) for lr in old.get("lrs") or ()]
    if left_out := [lr for lr in tried if lr not in faceoff.lrs]:
        every = " ".join(f"{lr:g}" for lr in dict.fromkeys([*tried, *faceoff.lrs]))
        raise RunError(
            f"{directory} tries learning rates that are left out here ({', '.join(f'{lr:g}' for lr in left_out)}); "
            f"rates may only be added: --lrs {every}, or choose another --out"
        )
