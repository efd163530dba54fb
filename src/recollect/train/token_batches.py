"""What a training step on a token task draws: of which sizes, and how samples of different lengths share a batch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from recollect.core.errors import ConfigError
from recollect.data.packing import Places, one_per_row, pack, place
from recollect.tasks.base import Size, Task
from recollect.tasks.batch import Bools, Ints
from recollect.train.curriculum import Ranges, Stage, ranges_at

Batching = Literal["one-size", "padded", "packed"]


class Drawn(NamedTuple):
    """The arrays of a step, (rows, positions) each."""

    tokens: Ints
    labels: Ints
    mask: Bools
    reset: Bools | None
    """See ``data.packing``; None where rows are single samples without padding."""
    filling: float
    """Share of positions that carry a sample."""


class TokenBatches:
    """Training batches of ``task``, a function of the step and its generator alone.

    The arguments are fields of ``RecallConfig``. Packed batches have ``shape`` (rows, row length) at every step and are
    filled with as many samples as fit, so that smaller sizes come in larger numbers. Raises ConfigError for a
    curriculum that the task cannot draw, and for rows too short for the longest sample.
    """

    shape: tuple[int, int] | None
    """Of packed batches; None otherwise."""

    def __init__(
        self,
        task: Task,
        batch_size: int,
        batching: Batching = "one-size",
        *,
        rows: int | None = None,
        row_length: int | None = None,
        curriculum: tuple[Stage, ...] = (),
    ) -> None:
        self.task, self.batch_size, self.batching, self.curriculum = task, batch_size, batching, curriculum
        self.row_length = row_length
        cells = task.cells()
        self._cells = np.array(cells, dtype=np.int64)
        self._largest: Size = tuple(self._cells.max(axis=0).tolist())
        lengths = [task.length(size) for size in cells]
        self._shortest = min(lengths)
        self._check_curriculum()
        longest = max([*lengths, *(task.length(tuple(high for _, high in stage.sizes)) for stage in curriculum)])
        if row_length is not None and row_length < longest:
            raise ConfigError(f"recall.row_length must be at least {longest}, the longest sample; got {row_length}")
        per_row = row_length or longest
        settled = rows or max(1, round(batch_size * sum(lengths) / len(lengths) / per_row))
        self.shape = (settled, per_row) if batching == "packed" else None

    def draw(self, step: int, rng: np.random.Generator) -> Drawn:
        """The batch of a 1-based step, from the ``train`` part of the task."""
        ranges = ranges_at(self.curriculum, step, self._largest)
        if self.batching == "one-size":
            size = None if ranges is None else self._sizes(rng, 1, ranges)[0]
            batch = self.task.batch(rng, self.batch_size, size=size, split="train")
            return Drawn(batch.tokens, batch.labels, batch.mask, None, 1.0)
        sizes, places = self._placed(rng, ranges)
        packed = pack(self.task.batch_of(rng, np.array(sizes, dtype=np.int64), split="train"), places)
        return Drawn(*packed, places.filling)

    def _sizes(self, rng: np.random.Generator, n: int, ranges: Ranges | None) -> list[Size]:
        """Uniform over the task's sizes, or over ``ranges``."""
        if ranges is None:
            sizes = self._cells[rng.integers(len(self._cells), size=n)]
        else:
            low, high = np.array(ranges).T
            sizes = rng.integers(low, high, size=(n, len(ranges)), endpoint=True)
        return [tuple(size) for size in sizes.tolist()]

    def _placed(self, rng: np.random.Generator, ranges: Ranges | None) -> tuple[list[Size], Places]:
        """Sizes and where their samples go, settled before any sample is drawn."""
        length = self.task.length
        if self.shape is None:
            sizes = self._sizes(rng, self.batch_size, ranges)
            return sizes, one_per_row([length(size) for size in sizes], self.row_length)
        rows, row_length = self.shape
        shortest = self._shortest if ranges is None else length(tuple(low for low, _ in ranges))
        sizes = self._sizes(rng, 1 + rows * row_length // shortest, ranges)
        places = place([length(size) for size in sizes], row_length, rows)
        return sizes[: len(places.length)], places

    def _check_curriculum(self) -> None:
        axes = self.task.axes
        for stage in self.curriculum:
            if len(stage.sizes) != len(axes):
                wanted = " and ".join(axes)
                raise ConfigError(f"recall.curriculum: sizes need a range for {wanted}, got {len(stage.sizes)}")
            for corner in zip(*stage.sizes, strict=True):
                self.task.batch(np.random.default_rng(0), 1, size=corner, split="train")
