"""A toy problem that can be told to die, to raise and what to score: for tests of face-offs."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from recollect.core.seeding import Streams
from recollect.train.problem import Evaluation
from recollect.train.run import FaceOff, RunConfig, TrainConfig
from toy_problem import Toy, ToyConfig


@dataclass(frozen=True)
class FragileConfig(ToyConfig, kind="fragile"):
    end: Literal["well", "raise", "kill"] = "well"
    """What happens at step 4, unless the environment variable FRAGILE_MENDED is set."""

    def build(self) -> Fragile:
        return Fragile(self)


class Fragile(Toy):
    """Scored as recall is, so that a report can be made of it."""

    headline = "accuracy"
    higher_is_better = True

    def batch(self, step: int, streams: Streams, device: torch.device) -> Any:
        assert isinstance(self.config, FragileConfig)
        if step == 4 and "FRAGILE_MENDED" not in os.environ:
            if self.config.end == "raise":
                raise ZeroDivisionError("the fourth batch\nis the last")
            if self.config.end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step, streams, device)

    def evaluate(self, model: nn.Module, streams: Streams, *, final: bool) -> Evaluation:
        error = super().evaluate(model, streams, final=final).metrics["error"]
        return Evaluation({"accuracy": 1 / (1 + error)})


def fragile_run(row: str = "good", end: Literal["well", "raise", "kill"] = "well", **train: Any) -> RunConfig:
    settings: dict[str, Any] = {"steps": 6, "lr": 1e-2, "log_every": 1, "eval_every": 2, "checkpoint_every": 2}
    config = TrainConfig(**{**settings, **train})
    return RunConfig("fragile_problem:fragile", "recall", row, 0, FragileConfig(end=end), config)


def fragile() -> FaceOff:
    """A row that dies and one that raises between two that do not."""
    runs = (fragile_run("first"), fragile_run("dies", "kill"), fragile_run("raises", "raise"), fragile_run("last"))
    return FaceOff("fragile", "Some of these fail", runs)


def raising() -> FaceOff:
    """A row that raises between two that do not."""
    return FaceOff("raising", "One of these fails", tuple(run for run in fragile().runs if run.row != "dies"))


def sound() -> FaceOff:
    """Two rows that do not fail."""
    return FaceOff("sound", "None of these fails", (fragile_run("first"), fragile_run("last")))
