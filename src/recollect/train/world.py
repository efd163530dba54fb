"""Training a world model on the episodes of an environment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from recollect.core.config import fingerprint, to_dict
from recollect.core.errors import ConfigError
from recollect.core.files import locked
from recollect.core.seeding import Streams
from recollect.data import EpisodeStore, Windows, collect
from recollect.data.windows import unbroken
from recollect.data.writer import SCHEMA
from recollect.envs.base import EnvConfig, Frames
from recollect.envs.tiles import TILE_PIXELS
from recollect.eval.attended import Attended
from recollect.eval.attended_frames import attended_frames
from recollect.eval.contexts import StoredContexts
from recollect.eval.imagination import Dream, Gallery, MeanPicture, Scores, dream, joined
from recollect.eval.imagined_env import ImaginedEnv
from recollect.eval.pictures import render_on, save_strips, tiles_of
from recollect.eval.probing import probe_scores
from recollect.models.dynamics import DynamicsConfig
from recollect.models.probe import Probe
from recollect.models.vision import Pixels, Tiles
from recollect.models.world_model import Batch, WorldModel
from recollect.train.loop import load_trained
from recollect.train.problem import Counting, Evaluation, Problem
from recollect.train.run import ProblemConfig

KEYS = ("action", "reward", "is_first", "is_terminal")
"""What is read beside what is seen."""


@dataclass(frozen=True)
class WorldConfig(ProblemConfig, kind="world"):
    """An environment, how it is seen, and the world model's parts. Episodes are trained on whole."""

    env: EnvConfig
    dynamics: DynamicsConfig
    observation: Literal["tiles", "pixels"] = "tiles"
    hidden: int = 128
    depth: int = 16
    """Channels of the first convolution, with pixels."""
    batch_size: int = 16
    image_weight: float = 1.0
    """On the error of the observation. Pictures that are means over k x k squares want k^2: a nat of the latents then
    costs what it does on the whole picture, and they hold enough of it to tell places apart."""
    reward_weight: float = 1.0
    continue_weight: float = 1.0
    kl_weight: float = 1.0
    free_nats: float = 1.0
    frames_at_once: int = 4096
    n_episodes: int = 4096
    """Episodes of the training split; a store of them is made once and shared by all runs that ask for the same."""
    n_valid: int = 128
    n_test: int = 512
    data_seed: int = 0
    longer: EnvConfig | None = None
    """Another size of the environment to be tested on as well, for what lies beyond the lengths trained on."""
    probe: Probe.Config | None = None
    """Train probes on the finished model; None: do not."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "n_episodes", "n_valid", "n_test"):
            if getattr(self, name) < 1:
                raise ConfigError(f"world.{name} must be at least 1, got {getattr(self, name)}")
        if self.env.observation == "image" and self.observation == "tiles":
            raise ConfigError(f"world.observation: {self.env.kind} shows no tiles; use observation=pixels")
        if self.longer is not None and (
            self.longer.observation_shape != self.env.observation_shape or self.longer.n_actions != self.env.n_actions
        ):
            raise ConfigError(f"world.longer: {self.longer.kind} is not seen or acted in as {self.env.kind} is")
        if self.probe is not None and not self.env.probed:
            raise ConfigError(f"world.probe: {self.env.kind} has nothing to probe for; mazes have")

    def build(self) -> World:
        return World(self)

    def model(self) -> WorldModel.Config:
        """The world model that fits the environment."""
        vision = (
            Tiles(n_codes=self.env.n_codes, hidden=self.hidden)
            if self.observation == "tiles"
            else Pixels(size=self._side, depth=self.depth)
        )
        return WorldModel.Config(
            n_actions=self.env.n_actions,
            dynamics=self.dynamics,
            vision=vision,
            hidden=self.hidden,
            image_weight=self.image_weight,
            kl_weight=self.kl_weight,
            free_nats=self.free_nats,
            reward_weight=self.reward_weight,
            continue_weight=self.continue_weight,
            frames_at_once=self.frames_at_once,
        )

    @property
    def _side(self) -> int:
        """Pixels along a side of a picture."""
        return self.env.observation_shape[0] * (TILE_PIXELS if self.env.observation == "tiles" else 1)


class World(Problem):
    """The evidence bound of whole episodes; scored by what is imagined after the context.

    Batches hold what the store holds, codes or pictures: codes are drawn where the model is.
    """

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.headline = "imagination_accuracy" if config.env.rewarded else "generation_mse"
        self.higher_is_better = config.env.rewarded
        self._opened: dict[tuple[EnvConfig, str, bool], Windows] = {}

    def build_model(self) -> WorldModel:
        return WorldModel(self.config.model())

    def batch(self, step: int, streams: Streams, device: torch.device) -> Batch:
        windows = self._windows("train")
        drawn = streams.numpy("data", "train", step).integers(len(windows), size=self.config.batch_size)
        return self._aligned(windows.batch_at(drawn), device)

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        assert isinstance(model, WorldModel)
        total, metrics = model.loss(self.see(batch), generator)
        return total, {**metrics}

    def compiled(self, model: nn.Module) -> list[nn.Module]:
        assert isinstance(model, WorldModel)
        return model.dynamics.compiled()

    def evaluate(self, model: nn.Module, streams: Streams, *, final: bool) -> Evaluation:
        assert isinstance(model, WorldModel)
        c, split = self.config, "test" if final else "valid"
        generator = streams.torch("eval", split, device=str(_device(model)))
        gallery = Gallery()
        again = None
        if final and c.env.observation == "image":
            again = streams.torch("eval", split, "again", device=str(_device(model)))
        metrics, curves = self._imagined(model, c.env, split, generator, gallery, again)
        if final and c.longer is not None:
            beyond, more = self._imagined(model, c.longer, split, generator)
            metrics |= {f"longer_{name}": value for name, value in beyond.items()}
            curves |= {f"longer_{name}": value for name, value in more.items()}
        if final and c.probe is not None:
            metrics |= self._probed(model, c.probe, streams)
        seen = self._attended(model) if final else Attended()
        details = {
            "context": c.env.context_length,
            "query": c.env.query_length,
            "env": to_dict(c.env),
            "observation": c.observation,
            "chance": 0.5,
            "attended": seen.details or None,
            **curves,
        }
        return Evaluation(metrics, details, {**gallery.arrays(), **seen.arrays} if final else {})

    def dream(self, model: WorldModel, split: str, episodes: Sequence[int], generator: torch.Generator) -> Dream:
        """Observe the context of some episodes of a split, and imagine their query."""
        arrays = self._windows(split).batch_at(list(episodes))
        batch = self.see(self._aligned(arrays, _device(model)))
        return dream(model, batch, self.config.env.context_length, generator)

    def contexts(self, split: str) -> StoredContexts:
        """The episodes of a split as the model sees them, for ``ImaginedEnv``."""
        return StoredContexts(self._windows(split).store, self.see)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        return {
            "params": sum(p.numel() for p in model.parameters()),
            "state_bytes": self.config.dynamics.state_bytes(1, seen=self.config.env.episode_length),
        }

    def see(self, batch: Batch) -> Batch:
        """The batch as the model sees it: codes are drawn where it sees pixels."""
        if self.config.observation == "tiles" or self.config.env.observation == "image":
            return batch
        return batch._replace(observation=render_on(batch.observation))

    def _imagined(
        self,
        model: WorldModel,
        env: EnvConfig,
        split: str,
        generator: torch.Generator,
        gallery: Gallery | None = None,
        again: torch.Generator | None = None,
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics and curves of all episodes of a split; ``again`` dreams each a second time."""
        scores: list[Scores] = []
        codes: list[npt.NDArray[np.uint8]] = []
        actions: list[npt.NDArray[Any]] = []
        truth: list[npt.NDArray[np.uint8]] = []
        n_values = 1
        pictures = MeanPicture()
        for arrays in self._parts(env, split):
            batch = self.see(self._aligned(arrays, _device(model)))
            result = dream(model, batch, env.context_length, generator, again)
            scores.append(result.scores)
            n_values = int(np.prod(result.truth_pictures.shape[2:]))
            pictures.add(result.truth_pictures)
            if gallery is not None:
                gallery.show(result)
            if env.judged:
                pictured = self.config.observation == "pixels"
                codes.append(tiles_of(result.imagined, env.n_codes) if pictured else result.imagined)
                truth.append(arrays["tiles"])
                actions.append(arrays["action"].argmax(-1))
        whole = joined(scores)
        metrics = whole.errors(n_values)
        if env.rewarded:
            metrics |= whole.rewards()
        if env.judged:
            frames = {"tiles": np.concatenate(truth), "action": np.concatenate(actions)}
            judged = env.judge(np.concatenate(codes), frames)
            metrics |= {f"{name}_accuracy": value for name, value in judged.items()}
        return metrics, {
            "generation_mse_curve": whole.generation.mean(0).tolist(),
            "reconstruction_mse_curve": whole.reconstruction.mean(0).tolist(),
            "surprise_curve": whole.surprise.mean(0).tolist(),
            **({} if again is None else {"expectation_mse_curve": whole.expectation.mean(0).tolist()}),
            "mean_picture_mse": pictures.error(),
        }

    def _attended(self, model: WorldModel) -> Attended:
        """What the first test episode is seen with, where the model has attention."""
        arrays = self._windows("test").batch_at([0])
        batch = self.see(self._aligned(arrays, _device(model)))
        return attended_frames(model, batch, self.config.env.context_length)

    def _probed(self, model: WorldModel, config: Probe.Config, streams: Streams) -> dict[str, float]:
        """Scores of probes that are trained on the training split and asked on the test split."""
        windows, device = self._windows("train", probed=True), _device(model)

        def drawn(step: int) -> tuple[Batch, Frames]:
            numbers = streams.numpy("data", "probe", step).integers(len(windows), size=self.config.batch_size)
            arrays = windows.batch_at(numbers)
            return self.see(self._aligned(arrays, device)), arrays

        def asked() -> Iterator[tuple[Batch, Frames]]:
            for arrays in self._parts(self.config.env, "test", probed=True):
                yield self.see(self._aligned(arrays, device)), arrays

        return probe_scores(model, config, drawn, asked(), streams.torch("eval", "probe", device=str(device)))

    def _parts(self, env: EnvConfig, split: str, *, probed: bool = False) -> Iterator[Frames]:
        """All episodes of a split in order, a batch at a time."""
        windows = self._windows(split, env, probed=probed)
        for start in range(0, len(windows), self.config.batch_size):
            yield windows.batch_at(np.arange(start, min(start + self.config.batch_size, len(windows))))

    def _aligned(self, arrays: Frames, device: torch.device) -> Batch:
        keys = (self.config.env.observation, *KEYS)
        tensors = (torch.from_numpy(arrays[key]).to(device) for key in keys)
        return Batch(*tensors, unbroken=unbroken(arrays["is_first"]))

    def _windows(self, split: str, env: EnvConfig | None = None, *, probed: bool = False) -> Windows:
        env = env or self.config.env
        if (env, split, probed) not in self._opened:
            keys = (env.observation, *KEYS, *(env.probed if probed else ()))
            self._opened[env, split, probed] = Windows(self._store(env, split), keys=keys)
        return self._opened[env, split, probed]

    def make_data(self, counting: Counting, workers: int = 0) -> None:
        for split in ("train", "valid", "test"):
            self._store(self.config.env, split, counting, workers)
        if self.config.longer is not None:
            self._store(self.config.longer, "test", counting, workers)

    def _store(self, env: EnvConfig, split: str, counting: Counting | None = None, workers: int = 0) -> EpisodeStore:
        """The split's episodes, made by whichever process comes first while the others wait."""
        c = self.config
        n = {"train": c.n_episodes, "valid": c.n_valid, "test": c.n_test}[split]
        root = Path(os.environ.get("RECOLLECT_DATA", "runs/data"))
        # With the schema in its name, a store of an older version is left alone and not met.
        path = root / f"{env.kind}-{fingerprint(env)}-{split}-seed{c.data_seed}-{n}-v{SCHEMA}"
        root.mkdir(parents=True, exist_ok=True)
        shown = nullcontext() if counting is None else counting(f"{path}: episodes")
        with locked(root / f"{path.name}.lock", wait=True), shown as progress:
            return collect(env, n, c.data_seed, path, split, progress, workers=workers)


def imagine_run(directory: Path, out: Path, *, episodes: int = 4, seed: int = 0) -> Path:
    """Imagine some test episodes with a trained run, and draw them over the truth: ``strips.png`` and ``strips.npz``.

    Returns the picture's path. Raises RunError when the run is missing or has no checkpoint, ConfigError when it is no
    world model or has fewer test episodes than asked for.
    """
    problem, model = _trained(directory)
    n_test = problem.config.n_test
    if not 1 <= episodes <= n_test:
        raise ConfigError(f"{directory} has {n_test} test episodes: --episodes must be in 1..{n_test}, got {episodes}")
    streams = Streams(seed)
    chosen = streams.numpy("eval", "imagine").permutation(n_test)[:episodes]
    result = problem.dream(model, "test", chosen.tolist(), streams.torch("eval", "imagine"))
    gallery = Gallery(episodes, films=0, frames=result.scores.generation.shape[1])
    gallery.show(result)
    return save_strips({k: v for k, v in gallery.arrays().items() if k.startswith("strip_")}, out)


def imagined_env(
    directory: Path,
    *,
    num_envs: int,
    split: str = "test",
    context: int | None = None,
    horizon: int | None = None,
    best: bool | None = None,
    device: str = "cpu",
    **choices: Any,
) -> ImaginedEnv:
    """The imagination of a trained run as a vector environment, going on from episodes of one of its splits.

    ``context`` and ``horizon`` are the environment's own context and query where they are None; ``choices`` are further
    arguments of ``ImaginedEnv``. Raises RunError and ConfigError as ``imagine_run`` does.
    """
    problem, model = _trained(directory, best=best, device=device)
    env = problem.config.env
    return ImaginedEnv(
        model,
        problem.contexts(split),
        num_envs=num_envs,
        context=env.context_length if context is None else context,
        horizon=env.query_length if horizon is None else horizon,
        **choices,
    )


def _trained(directory: Path, *, best: bool | None = None, device: str = "cpu") -> tuple[World, WorldModel]:
    run, problem, model = load_trained(directory, best=best, device=device)
    if not isinstance(problem, World) or not isinstance(model, WorldModel):
        raise ConfigError(f"{directory} is a run of group '{run.group}'; only world models imagine")
    return problem, model


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
