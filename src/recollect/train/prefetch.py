"""Batches made ahead by processes of their own (``core.ahead``).

A batch is addressed by its step, so it does not matter who makes it. Workers build the problem from its config.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recollect.core.ahead import WorkerDiedError, made_ahead
from recollect.core.errors import ConfigError, RunError
from recollect.core.seeding import Streams

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from recollect.train.problem import Problem
    from recollect.train.run import ProblemConfig, RunConfig

Take = Callable[[int], Any]
"""The batch of a step, on the run's device. Steps must be asked for in order, each once."""

Change = Callable[["Problem", Any], Any]
"""From a problem and one of its batches to what is taken of it."""


def check_workers(workers: int) -> None:
    """Raise ConfigError when there cannot be that many."""
    if workers < 0:
        raise ConfigError(f"--data-workers must not be negative, got {workers}; 0 makes batches in the process itself")


@contextmanager
def batches(
    run: RunConfig, problem: Problem, first: int, device: torch.device, workers: int, cut: Change | None = None
) -> Generator[Take]:
    """Batches of the steps from ``first`` on: made here, or ahead of time by ``workers`` processes. The same bits.

    ``cut`` says what of a batch goes to the device; None: all of it. It must pickle.

    What a worker raises is raised by the call that asks for that batch; RunError there when a worker was killed. All
    workers have ended when the context has.
    """
    import torch

    from recollect.train.batches import map_leaves, to_device

    steps = range(first, run.train.steps + 1)
    if workers == 0 or not steps:
        streams, cpu = Streams(run.seed), torch.device("cpu")
        change = cut or _all
        yield lambda step: to_device(change(problem, problem.batch(step, streams, cpu)), device)
        return
    with made_ahead(_Maker(run.problem, run.seed, cut or _all), steps, workers) as made:

        def take(step: int) -> Any:
            try:
                packed = made(step)
            except WorkerDiedError as how:
                raise RunError(
                    f"the data worker that was to make the batch of step {step} {how}; the last checkpoint is kept: "
                    f"run the same command again, with --data-workers 0 if this goes on"
                ) from None
            return to_device(map_leaves(packed, _unpacked), device)

        yield take


@dataclass(frozen=True)
class _Maker:
    """Builds a problem in a worker, and makes its batches there."""

    config: ProblemConfig
    seed: int
    cut: Change

    def __call__(self) -> Take:
        import torch

        from recollect.train.batches import map_leaves

        torch.set_num_threads(1)
        problem, streams, cpu = self.config.build(), Streams(self.seed), torch.device("cpu")
        return lambda step: map_leaves(self.cut(problem, problem.batch(step, streams, cpu)), _packed)


def _all(_: Problem, batch: Any) -> Any:
    return batch


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


def _packed(leaf: Any) -> Any:
    import torch

    return _Packed(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _unpacked(leaf: Any) -> Any:
    return leaf.tensor() if isinstance(leaf, _Packed) else leaf
