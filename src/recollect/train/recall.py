"""Training a language model on a recall task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.seeding import Streams
from recollect.eval.attended import Attended, attended
from recollect.eval.recall import recall_scores
from recollect.layers.sparse import set_dense
from recollect.layers.sparse_options import SparseOptions
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.ops.patterns import Pattern, key_budget
from recollect.tasks.base import Split, TaskConfig
from recollect.train.curriculum import Stage, check_order
from recollect.train.problem import Evaluation, Problem
from recollect.train.run import ProblemConfig
from recollect.train.token_batches import Batching, TokenBatches


@dataclass(frozen=True)
class RecallConfig(ProblemConfig, kind="recall"):
    """A recall task for a backbone, and how it is taught (``docs/training-recall.md``)."""

    task: TaskConfig
    backbone: Backbone.Config
    batch_size: int = 32
    """Samples per step; of ``packed`` rows, the samples of average size they are made to hold."""
    batching: Batching = "one-size"
    """``one-size``: all samples of a step share one size, drawn for the step. ``padded``: each has a size and a row of
    its own. ``packed``: each has a size of its own, and a row holds several, with resets between them."""
    rows: int | None = None
    """Rows per step (``packed``); None: what ``batch_size`` samples of the task would fill."""
    row_length: int | None = None
    """Positions per row; None: the longest sample of the run (``packed``), or of the step (``padded``)."""
    curriculum: tuple[Stage, ...] = ()
    """Sizes drawn in the first steps instead of the task's."""
    dense_steps: int = 0
    """Training steps at first in which sparse attention reads all the past; evaluation never does."""
    embedding_std: float = 0.1
    aux_weight: float = 0.1
    valid_samples: int = 32
    """Samples per size in evaluations during training."""
    test_samples: int = 128
    """Samples per size in the final evaluation."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rows", "row_length", "valid_samples", "test_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"recall.{name} must be at least 1, got {value}")
        if self.batching not in get_args(Batching):
            raise ConfigError(f"recall.batching must be one of {', '.join(get_args(Batching))}, got {self.batching!r}")
        if self.rows is not None and self.batching != "packed":
            raise ConfigError(f"recall.rows is for batching=packed, not {self.batching}; leave it out")
        if self.row_length is not None and self.batching == "one-size":
            raise ConfigError("recall.row_length is for batching=packed or padded, not one-size; leave it out")
        check_order(self.curriculum)
        if self.dense_steps < 0:
            raise ConfigError(f"recall.dense_steps must not be negative, got {self.dense_steps}")
        if self.dense_steps and not any(isinstance(layer, SparseOptions) for layer in self.backbone.layers):
            raise ConfigError("recall.dense_steps needs a layer with sparse attention, sparse or hax; leave it at 0")

    def build(self) -> Recall:
        return Recall(self)


class RecallBatch(NamedTuple):
    """What ``LanguageModel.loss`` reads, (rows, positions) each, and the mode of the step."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    reset: Tensor | None
    """True where a sample begins and in padding; None where rows are single samples without padding."""
    filling: float
    """Share of positions that carry a sample."""
    dense: bool
    """Whether sparse attention reads all the past."""


class Recall(Problem):
    """Cross-entropy on the asked positions; scored by per-sample accuracy over all sizes."""

    headline = "accuracy"
    higher_is_better = True

    def __init__(self, config: RecallConfig) -> None:
        self.config = config
        self.task = config.task.build()
        self.batches = TokenBatches(
            self.task,
            config.batch_size,
            config.batching,
            rows=config.rows,
            row_length=config.row_length,
            curriculum=config.curriculum,
        )

    def build_model(self) -> LanguageModel:
        c = self.config
        return LanguageModel(
            LanguageModel.Config(
                self.task.vocab_size, c.backbone, embedding_std=c.embedding_std, aux_weight=c.aux_weight
            )
        )

    def batch(self, step: int, streams: Streams, device: torch.device) -> RecallBatch:
        drawn = self.batches.draw(step, streams.numpy("data", "train", step))
        tokens, labels, mask = (torch.from_numpy(a).to(device) for a in (drawn.tokens, drawn.labels, drawn.mask))
        reset = None if drawn.reset is None else torch.from_numpy(drawn.reset).to(device)
        return RecallBatch(tokens, labels, mask, reset, drawn.filling, step <= self.config.dense_steps)

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Deterministic given the batch: ``generator`` is not used."""
        del generator
        assert isinstance(model, LanguageModel)
        assert isinstance(batch, RecallBatch)
        set_dense(model, batch.dense)
        total, metrics = model.loss(batch.tokens, batch.labels, batch.mask, batch.reset)
        return total, {**metrics, "filling": batch.filling}

    def evaluate(self, model: nn.Module, streams: Streams, *, final: bool) -> Evaluation:
        assert isinstance(model, LanguageModel)
        c = self.config
        split: Split = "test" if final else "valid"
        n = c.test_samples if final else c.valid_samples
        scores = recall_scores(model, self.task, lambda cell: streams.numpy("eval", split, cell), n, split)
        metrics = {
            "accuracy": scores.mean,
            "accuracy_largest": float(scores.accuracy[-1]),
            "all_correct": float(scores.all_correct.mean()),
        }
        if self.task.blind is not None:
            metrics["binding_gap"] = scores.mean - scores.oracles[self.task.blind]
        cells = scores.cells(self.task.axes)
        details = {
            "cells": cells,
            "oracles": scores.oracles,
            "key_budget": self._key_budget(),
            "blind": self.task.blind,
        }
        seen = attended(model, self.task, lambda name: streams.numpy("eval", name)) if final else Attended()
        return Evaluation(metrics, {**details, "attended": seen.details or None}, seen.arrays)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        return {
            "params": sum(p.numel() for p in model.parameters()),
            "state_bytes": self.config.backbone.state_bytes(1, seen=self.task.max_length - 1),
            "key_budget": self._key_budget(),
        }

    def _key_budget(self) -> int | None:
        """Most keys one query may read in any layer: 0 without attention, None where there is no bound."""
        unions: list[tuple[Pattern, ...]] = [
            getattr(layer, "union", getattr(layer, "patterns", ())) for layer in self.config.backbone.layers
        ]
        budgets = [key_budget(union) if union else 0 for union in unions]
        return None if None in budgets else max(b for b in budgets if b is not None)
