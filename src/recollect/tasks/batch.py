"""What every token task hands out, and how an answer is scored."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Floats: TypeAlias = npt.NDArray[np.float64]

PAD = 3
"""The token that fills what samples leave free."""


class TokenBatch(NamedTuple):
    """Token sequences with next-token labels. All arrays own their memory."""

    tokens: Ints
    """(B, L) model input."""
    labels: Ints
    """(B, L) where an answer is asked for, that answer; elsewhere the token that follows."""
    mask: Bools
    """(B, L) true exactly where an answer is asked for; loss and accuracy are read there and nowhere else."""
    sizes: Ints
    """(B, axes) size of each sample, as the task counts it; for joint recall (contexts, keys)."""


def accuracy(predictions: npt.NDArray[Any], batch: TokenBatch) -> Floats:
    """Fraction of the asked positions answered correctly, per sample: predictions (B, L) token ids -> (B,).

    The published figure is the mean of this over samples, so a small table weighs as much as a large one.
    """
    if predictions.shape != batch.labels.shape:
        raise ValueError(f"predictions {predictions.shape} do not have the shape of the labels {batch.labels.shape}")
    hits = (predictions == batch.labels) & batch.mask
    return hits.sum(axis=1) / batch.mask.sum(axis=1)
