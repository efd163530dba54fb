"""How runs end before their end: asked to stop, they leave what they have; and one process of several says why."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from recollect.core.errors import RunError
from recollect.train.problem import Counting

TOLD = "told by another process of this run"
"""A note on errors that another process reports to the user; see ``is_told``."""


def is_told(error: BaseException) -> bool:
    """Whether another process of the run says this error to the user, so that this one must not."""
    return TOLD in getattr(error, "__notes__", ())


class StoppedError(RunError):
    """The run was asked to stop and left a checkpoint behind; the same command goes on from it."""


def stoppable(counting: Counting, stop: Callable[[], bool] | None, directory: Path) -> Counting:
    """The same, but that a count ends with StoppedError where ``stop`` says yes."""

    @contextmanager
    def counted(title: str) -> Generator[Callable[[int, int], None]]:
        with counting(title) as show:

            def ask(done: int, total: int) -> None:
                show(done, total)
                if stop is not None and stop() and done < total:
                    raise StoppedError(
                        f"stopped after {done} of {total} of the data that {directory} needs; the same command goes on"
                    )

            yield ask

    return counted
