"""Training a language model on a recall task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.core.seeding import Streams
from recollect.eval.attended import Attended, attended
from recollect.eval.recall import recall_scores
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.ops.patterns import Pattern, key_budget
from recollect.tasks.base import Split, TaskConfig
from recollect.train.problem import Evaluation, Problem
from recollect.train.run import ProblemConfig


@dataclass(frozen=True)
class RecallConfig(ProblemConfig, kind="recall"):
    """A recall task for a backbone. Every training batch holds samples of one size drawn from the task's ranges."""

    task: TaskConfig
    backbone: Backbone.Config
    batch_size: int = 32
    embedding_std: float = 0.1
    aux_weight: float = 0.1
    valid_samples: int = 32
    """Samples per size in evaluations during training."""
    test_samples: int = 128
    """Samples per size in the final evaluation."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "valid_samples", "test_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"recall.{name} must be at least 1, got {getattr(self, name)}")

    def build(self) -> Recall:
        return Recall(self)


class Recall(Problem):
    """Cross-entropy on the asked positions; scored by per-sample accuracy over all sizes."""

    headline = "accuracy"
    higher_is_better = True

    def __init__(self, config: RecallConfig) -> None:
        self.config = config
        self.task = config.task.build()

    def build_model(self) -> LanguageModel:
        c = self.config
        return LanguageModel(
            LanguageModel.Config(
                self.task.vocab_size, c.backbone, embedding_std=c.embedding_std, aux_weight=c.aux_weight
            )
        )

    def batch(self, step: int, streams: Streams, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        drawn = self.task.batch(streams.numpy("data", "train", step), self.config.batch_size, split="train")
        tokens, labels, mask = (torch.from_numpy(a).to(device) for a in (drawn.tokens, drawn.labels, drawn.mask))
        return tokens, labels, mask

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Deterministic given the batch: ``generator`` is not used."""
        del generator
        assert isinstance(model, LanguageModel)
        total, metrics = model.loss(*batch)
        return total, {**metrics}

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
