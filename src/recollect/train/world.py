"""Training a world model on the episodes of an environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor, nn

from recollect.core.config import fingerprint, to_dict
from recollect.core.errors import ConfigError
from recollect.core.files import locked
from recollect.core.seeding import Streams
from recollect.data import EpisodeStore, Windows, collect
from recollect.data.writer import SCHEMA
from recollect.envs.base import EnvConfig
from recollect.envs.tiles import TILE_PIXELS
from recollect.eval.imagination import Dream, dream, save_strips, strip
from recollect.eval.pictures import render_on
from recollect.models.backbone import Backbone
from recollect.models.latent import LatentConfig
from recollect.models.vision import Pixels, Tiles
from recollect.models.world_model import Batch, WorldModel
from recollect.train.loop import load_trained
from recollect.train.problem import Evaluation, Problem
from recollect.train.run import ProblemConfig

KEYS = ("action", "reward", "is_first")
"""What is read beside what is seen."""


@dataclass(frozen=True)
class WorldConfig(ProblemConfig, kind="world"):
    """An environment, how it is seen, and the world model's parts. Episodes are trained on whole."""

    env: EnvConfig
    backbone: Backbone.Config
    observation: Literal["tiles", "pixels"] = "tiles"
    latent: LatentConfig = field(default_factory=lambda: LatentConfig(groups=16, classes=16))
    hidden: int = 128
    depth: int = 16
    """Channels of the first convolution, with pixels."""
    batch_size: int = 16
    reward_weight: float = 1.0
    kl_weight: float = 1.0
    free_nats: float = 1.0
    n_episodes: int = 4096
    """Episodes of the training split; a store of them is made once and shared by all runs that ask for the same."""
    n_valid: int = 128
    n_test: int = 512
    data_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "n_episodes", "n_valid", "n_test"):
            if getattr(self, name) < 1:
                raise ConfigError(f"world.{name} must be at least 1, got {getattr(self, name)}")
        if self.env.observation == "image" and self.observation == "tiles":
            raise ConfigError(f"world.observation: {self.env.kind} shows no tiles; use observation=pixels")

    def build(self) -> World:
        return World(self)

    def model(self) -> WorldModel.Config:
        """The world model that fits the environment."""
        vision = (
            Tiles(n_codes=self.env.n_codes, hidden=self.hidden)
            if self.observation == "tiles"
            else Pixels(size=self._side(), depth=self.depth)
        )
        return WorldModel.Config(
            n_actions=self.env.n_actions,
            backbone=self.backbone,
            vision=vision,
            latent=self.latent,
            hidden=self.hidden,
            kl_weight=self.kl_weight,
            free_nats=self.free_nats,
            reward_weight=self.reward_weight,
        )

    def _side(self) -> int:
        """Pixels along a side of what is seen."""
        return self.env.observation_shape[0] * (TILE_PIXELS if self.env.observation == "tiles" else 1)


class World(Problem):
    """The evidence bound of whole episodes; scored by the reward predicted at the end of the imagined query."""

    headline = "imagination_accuracy"
    higher_is_better = True

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self._windows: dict[str, Windows] = {}

    def build_model(self) -> WorldModel:
        return WorldModel(self.config.model())

    def batch(self, step: int, streams: Streams, device: torch.device) -> Batch:
        windows = self._split("train")
        drawn = streams.numpy("data", "train", step).integers(len(windows), size=self.config.batch_size)
        return self._load(windows, drawn, device)

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        assert isinstance(model, WorldModel)
        total, metrics = model.loss(batch, generator)
        return total, {**metrics}

    def evaluate(self, model: nn.Module, streams: Streams, *, final: bool) -> Evaluation:
        assert isinstance(model, WorldModel)
        device = next(model.parameters()).device
        split = "test" if final else "valid"
        windows = self._split(split)
        generator = streams.torch("eval", split, device=str(device))
        env = self.config.env
        result = self.dream(model, split, range(len(windows)), generator)
        metrics = {
            "imagination_accuracy": result.imagination_accuracy,
            "inference_accuracy": result.inference_accuracy,
            "reconstruction_mse": result.reconstruction_mse,
            "generation_mse": float(result.generation_mse.mean()),
        }
        details = {
            "context": env.context_length,
            "query": env.query_length,
            "env": to_dict(env),
            "observation": self.config.observation,
            "chance": 0.5,
            "generation_mse_curve": result.generation_mse.tolist(),
        }
        return Evaluation(metrics, details, strip(result) if final else {})

    def dream(self, model: WorldModel, split: str, episodes: Sequence[int], generator: torch.Generator) -> Dream:
        """Observe the context of some episodes of a split, and imagine their query."""
        batch = self._load(self._split(split), list(episodes), next(model.parameters()).device)
        return dream(model, batch, self.config.env.context_length, generator)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        return {
            "params": sum(p.numel() for p in model.parameters()),
            "state_bytes": self.config.backbone.state_bytes(1, seen=self.config.env.episode_length),
        }

    def _load(self, windows: Windows, numbers: npt.ArrayLike, device: torch.device) -> Batch:
        arrays = windows.batch_at(numbers)
        seen = self.config.env.observation
        batch = Batch(*(torch.from_numpy(arrays[key]).to(device) for key in (seen, *KEYS)))
        if seen == self.config.observation or seen == "image":
            return batch
        return batch._replace(observation=render_on(batch.observation))

    def _split(self, split: str) -> Windows:
        if split not in self._windows:
            keys = (self.config.env.observation, *KEYS)
            self._windows[split] = Windows(self._store(split), keys=keys)
        return self._windows[split]

    def _store(self, split: str) -> EpisodeStore:
        """The split's episodes, made by whichever process comes first while the others wait."""
        c = self.config
        n = {"train": c.n_episodes, "valid": c.n_valid, "test": c.n_test}[split]
        root = Path(os.environ.get("RECOLLECT_DATA", "runs/data"))
        # With the schema in its name, a store of an older version is left alone and not met.
        path = root / f"{c.env.kind}-{fingerprint(c.env)}-{split}-seed{c.data_seed}-{n}-v{SCHEMA}"
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f"{path.name}.lock", wait=True):
            return collect(c.env, n, c.data_seed, path, split)


def imagine_run(directory: Path, out: Path, *, episodes: int = 4, seed: int = 0) -> Path:
    """Imagine some test episodes with a trained run, and draw them over the truth: ``strips.png`` and ``strips.npz``.

    Returns the picture's path. Raises RunError when the run is missing or has no checkpoint, ConfigError when it is no
    world model or has fewer test episodes than asked for.
    """
    run, problem, model = load_trained(directory)
    if not isinstance(problem, World) or not isinstance(model, WorldModel):
        raise ConfigError(f"{directory} is a run of group '{run.group}'; only world models imagine")
    n_test = problem.config.n_test
    if not 1 <= episodes <= n_test:
        raise ConfigError(f"{directory} has {n_test} test episodes: --episodes must be in 1..{n_test}, got {episodes}")
    streams = Streams(seed)
    chosen = streams.numpy("eval", "imagine").permutation(n_test)[:episodes]
    result = problem.dream(model, "test", chosen.tolist(), streams.torch("eval", "imagine"))
    query = result.truth.shape[1]
    return save_strips(strip(result, episodes, query), out)
