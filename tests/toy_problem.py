"""A problem that trains in milliseconds and can be told to go wrong: for tests of the loop, the sweep and the CLI."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recollect.core.seeding import Streams
from recollect.train.problem import Evaluation, Problem
from recollect.train.run import FaceOff, ProblemConfig, RunConfig, TrainConfig


@dataclass(frozen=True)
class ToyConfig(ProblemConfig, kind="toy"):
    width: int = 8
    dropout: float = 0.1
    nan_at: int = 0
    """Step whose batch holds a NaN."""
    bad_gradient_at: int = 0
    """Step whose loss is finite and whose gradient is not."""

    def build(self) -> Toy:
        return Toy(self)


class Toy(Problem):
    """Regression of a fixed linear map, with every source of chance there is: batches, noise, dropout."""

    headline = "error"
    higher_is_better = False

    def __init__(self, config: ToyConfig) -> None:
        self.config = config

    def build_model(self) -> nn.Module:
        width = self.config.width
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(self.config.dropout), nn.Linear(width, 1))

    def batch(self, step: int, streams: Streams, device: torch.device) -> dict[str, Tensor]:
        time.sleep(float(os.environ.get("TOY_PAUSE_S", "0")))
        x = torch.from_numpy(streams.numpy("data", "train", step).normal(size=(16, 4)).astype(np.float32))
        if step == self.config.nan_at:
            x[3, 1] = torch.nan
        scale = torch.tensor(0.0 if step == self.config.bad_gradient_at else 1.0)
        return {"x": x.to(device), "scale": scale.to(device)}

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        x = batch["x"]
        noise = 0.1 * torch.randn(len(x), generator=generator, device=x.device)
        error = (model(x)[:, 0] - x.sum(1) - noise).square().mean()
        # The square root of zero is finite and its slope is not.
        odd = (error * batch["scale"]).sqrt() if not batch["scale"] else 0.0
        return error + odd, {"noise": noise.mean(), "autocast": float(torch.is_autocast_enabled(x.device.type))}

    def evaluate(self, model: nn.Module, streams: Streams, *, final: bool) -> Evaluation:
        assert not model.training
        assert not torch.is_grad_enabled()
        x = torch.from_numpy(streams.numpy("eval", "test").normal(size=(64, 4)).astype(np.float32))
        prediction = model(x)[:, 0]
        error = float((prediction - x.sum(1)).square().mean())
        return Evaluation({"error": error, "undefined": float("nan")}, {"final": final}, {"y": prediction.numpy()})

    def describe(self, model: nn.Module) -> dict[str, Any]:
        return {"params": sum(p.numel() for p in model.parameters()), "state_bytes": 0}


def toy_run(row: str = "good", *, seed: int = 0, problem: ToyConfig | None = None, **train: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "steps": 30,
        "lr": 1e-2,
        "warmup_steps": 5,
        "ema": 0.9,
        "log_every": 1,
        "eval_every": 8,
        "checkpoint_every": 7,
    }
    config = TrainConfig(**{**settings, **train})
    return RunConfig("toy_problem:faceoff", "recall", row, seed, problem or ToyConfig(), config)


def faceoff() -> FaceOff:
    """Three rows, of which one fails half-way."""
    runs = (toy_run("good"), toy_run("bad", problem=ToyConfig(nan_at=20)), toy_run("wide", problem=ToyConfig(width=16)))
    return FaceOff("toy", "A toy face-off", runs)


def not_a_faceoff() -> int:
    """What no recipe may return."""
    return 3


def finished_faceoff() -> FaceOff:
    """Two rows that do not fail."""
    return FaceOff("toy", "A toy face-off", (faceoff().runs[0], faceoff().runs[2]))
