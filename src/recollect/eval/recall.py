"""Scores of a language model on a recall task: by size, beside what solvers that know only part of the task reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from recollect.models.language_model import LanguageModel
from recollect.tasks.base import Size, Split, Task
from recollect.tasks.batch import Floats, accuracy


class RecallScores(NamedTuple):
    """Per-sample accuracy averaged over each cell (a size the task draws), and summaries of it."""

    sizes: list[Size]
    accuracy: Floats
    """(cells,) mean accuracy of each."""
    all_correct: Floats
    """(cells,) share of samples answered without a mistake."""
    oracles: dict[str, float]
    """Mean accuracy of each solver of ``task.oracles`` on the very same samples."""

    @property
    def mean(self) -> float:
        """All cells weigh the same, as in the published metric."""
        return float(self.accuracy.mean())

    def cells(self, axes: tuple[str, ...]) -> dict[str, Any]:
        """The scores by size as JSON data."""
        return {
            "axes": list(axes),
            "sizes": [list(size) for size in self.sizes],
            "accuracy": self.accuracy.tolist(),
            "all_correct": self.all_correct.tolist(),
        }


@torch.no_grad()
def recall_scores(
    model: LanguageModel,
    task: Task,
    rng_of_cell: Callable[[int], np.random.Generator],
    n_samples: int,
    split: Split = "test",
) -> RecallScores:
    """Score ``n_samples`` fresh samples of every size; ``rng_of_cell(i)`` gives each cell its own stream."""
    device = model.embedding.weight.device
    sizes = task.cells()
    scores, perfect = np.zeros(len(sizes)), np.zeros(len(sizes))
    sums = dict.fromkeys(task.oracles, 0.0)
    for i, size in enumerate(sizes):
        batch = task.batch(rng_of_cell(i), n_samples, size=size, split=split)
        h, _, _ = model.hidden(torch.from_numpy(batch.tokens).to(device))
        each = accuracy(model.head(h).argmax(-1).cpu().numpy(), batch)
        scores[i], perfect[i] = each.mean(), (each == 1).mean()
        for name, oracle in task.oracles.items():
            sums[name] += float(accuracy(oracle(batch), batch).mean())
    return RecallScores(sizes, scores, perfect, {name: total / len(sizes) for name, total in sums.items()})
