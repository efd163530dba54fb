"""Scores of a language model on joint recall: by table size, beside what solvers without memory of context reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from recollect.models.language_model import LanguageModel
from recollect.tasks import JointRecall
from recollect.tasks.batch import Floats, accuracy
from recollect.tasks.oracles import ORACLES


class RecallScores(NamedTuple):
    """Per-sample accuracy averaged over each cell of table sizes (rows: contexts, columns: keys), and
    summaries of it.
    """

    n_contexts: list[int]
    n_keys: list[int]
    accuracy: Floats
    """(contexts, keys) mean accuracy of each cell."""
    all_correct: Floats
    """(contexts, keys) share of samples answered without a mistake."""
    oracles: dict[str, float]
    """Mean accuracy of each trivial solver on the very same samples."""

    @property
    def mean(self) -> float:
        """All cells weigh the same, as in the published metric."""
        return float(self.accuracy.mean())


@torch.no_grad()
def recall_scores(
    model: LanguageModel, task: JointRecall, rng_of_cell: Callable[[int], np.random.Generator], n_samples: int
) -> RecallScores:
    """Score ``n_samples`` fresh tables of every size the task draws; ``rng_of_cell(i)`` gives each cell its
    own stream.
    """
    device = model.embedding.weight.device
    contexts = list(range(task.config.n_contexts[0], task.config.n_contexts[1] + 1))
    keys = list(range(task.config.n_keys[0], task.config.n_keys[1] + 1))
    scores = np.zeros((len(contexts), len(keys)))
    perfect = np.zeros_like(scores)
    oracle_sums = dict.fromkeys(ORACLES, 0.0)
    for i, n_contexts in enumerate(contexts):
        for j, n_keys in enumerate(keys):
            batch = task.batch(rng_of_cell(i * len(keys) + j), n_samples, size=(n_contexts, n_keys))
            h, _, _ = model.hidden(torch.from_numpy(batch.tokens).to(device))
            predictions = model.head(h).argmax(-1).cpu().numpy()
            each = accuracy(predictions, batch)
            scores[i, j], perfect[i, j] = each.mean(), (each == 1).mean()
            for name, oracle in ORACLES.items():
                oracle_sums[name] += float(accuracy(oracle(batch, task), batch).mean())
    oracles = {name: total / scores.size for name, total in oracle_sums.items()}
    return RecallScores(contexts, keys, scores, perfect, oracles)
