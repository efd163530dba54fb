"""What runs, as it runs: live on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from recollect.train.executors.base import Job
from recollect.train.sweep import Display

LINE_EVERY_S = 15.0


@contextmanager
def display(title: str) -> Generator[Display]:
    """A function that shows the jobs of a sweep, in the way that suits where the output goes."""
    console = Console()
    if not console.is_terminal:
        print(title, flush=True)
        yield PlainLines()
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield lambda jobs: live.update(table(title, jobs))


class PlainLines:
    """Prints a run when its status changes, and every running one each ``LINE_EVERY_S`` seconds."""

    def __init__(self) -> None:
        self._status: dict[str, str] = {}
        self._printed = time.monotonic()

    def __call__(self, jobs: Sequence[Job]) -> None:
        due = time.monotonic() - self._printed >= LINE_EVERY_S
        if due:
            self._printed = time.monotonic()
        for job in jobs:
            changed = self._status.get(job.name, "waiting") != job.status
            self._status[job.name] = job.status
            if changed or (due and job.status == "running"):
                print("  ".join(part for part in _parts(job) if part), flush=True)


def table(title: str, jobs: Sequence[Job]) -> Table:
    """One line per run: where it is, how well it does, how long it still takes."""
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    grid.add_column("run")
    for column in ("status", "step", "loss", "score", "steps/s", "left"):
        grid.add_column(column, justify="right")
    for job in jobs:
        grid.add_row(
            job.name,
            {"failed": "[red]failed[/]", "finished": "[green]finished[/]"}.get(job.status, job.status),
            f"{job.step}/{job.run.train.steps}",
            _number(job.loss),
            _number(job.headline),
            _number(job.steps_per_s),
            _duration(job.left_s) if job.status == "running" else "",
        )
    return grid


@contextmanager
def counting(title: str) -> Generator[Callable[[int, int], None]]:
    """A function of (done, all) that shows how far something is, and how long it still takes."""
    console = Console()
    if not console.is_terminal:
        yield CountedLines(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class CountedLines:
    """Prints how far something is each ``LINE_EVERY_S`` seconds. What was done before its first call has no speed."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._printed = time.monotonic()
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        start, before = self._first = self._first or (now, done)
        if now - self._printed >= LINE_EVERY_S:
            self._printed = now
            left = (total - done) * (now - start) / (done - before) if done > before else None
            remaining = f", {_duration(left)} left" if left is not None else ""
            print(f"{self._title}: {done} of {total}{remaining}", flush=True)


def _parts(job: Job) -> list[str]:
    left = f"{_duration(job.left_s)} left" if job.status == "running" and job.left_s is not None else ""
    return [
        job.name,
        job.status,
        f"step {job.step}/{job.run.train.steps}",
        f"loss {_number(job.loss)}" if job.loss is not None else "",
        f"score {_number(job.headline)}" if job.headline is not None else "",
        f"{_number(job.steps_per_s)} steps/s" if job.status == "running" and job.steps_per_s else "",
        left,
        job.error,
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
