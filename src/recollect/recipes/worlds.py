"""The world-model face-off: models that differ in their memory only, on environments that ask for one.

``worlds-micro``: four environments, one of each family, at sizes that two CPU cores learn in minutes per row.
``worlds-mini``: four of the standard sizes, a night on two cores or minutes per row on a GPU. And every environment by
itself at three scales of model and training: ``worlds-micro-ENV``, ``worlds-mini-ENV``, ``worlds-paper-ENV`` with ENV
as in ``recollect list``; ``paper`` is the published size, pixels and number of episodes (arXiv 2307.02064, as far as
it is known), for a GPU.

Within a group all rows share the environment, vision, latents, heads, training and, within a tenth, the number of
parameters (``models.presets``). The recurrent baseline's gradients and the Transformer-XL's memory reach back
``window`` steps, as the paper truncates both; all others are trained on whole episodes in parallel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from recollect.envs import ENVS, DistractingMemory, EnvConfig, MultiDoorsKeys, Rooms, find
from recollect.envs.rooms.walk import FirstPersonConfig
from recollect.models.latent import LatentConfig
from recollect.models.presets import Size, preset
from recollect.models.probe import Probe
from recollect.train.run import FaceOff, RunConfig, TrainConfig
from recollect.train.world import WorldConfig

ROWS = ("rssm", "tssm", "s4wm", "s4dwm", "s5wm", "mambawm", "mamba2wm", "haxwm")


@dataclass(frozen=True)
class Scale:
    """Models and training of one size."""

    size: Size
    train: TrainConfig
    grid: Literal["tiles", "pixels"]
    """How grid worlds are seen."""
    side: int
    """Of first-person pictures, in pixels."""
    depth: int
    batch_size: int
    n_episodes: int
    n_pictured: int
    """Episodes of pictures: they take a hundred times the room of tiles, and longer to make."""
    n_valid: int
    n_test: int
    probe: Probe.Config
    frames_at_once: int = 4096

    def runs(self, recipe: str, group: str, env: EnvConfig, *, window: int = 64, rows: Sequence[str] = ROWS) -> Runs:
        """One run for each of ``rows`` on an environment."""
        size = replace(self.size, window=window, chunk=window)
        pictures = env.observation == "image"
        if isinstance(env, FirstPersonConfig):
            env = replace(env, side=self.side)
        problem = WorldConfig(
            env,
            preset("s5wm", size),
            observation="pixels" if pictures else self.grid,
            hidden=size.hidden,
            depth=self.depth,
            batch_size=self.batch_size,
            frames_at_once=self.frames_at_once,
            # Of all frames of an episode only the last is asked: in a mean over frames its reward would not be heard.
            reward_weight=env.episode_length / 2 if env.rewarded else 0.0,
            continue_weight=1.0 if env.rewarded else 0.0,
            n_episodes=self.n_pictured if pictures else self.n_episodes,
            n_valid=self.n_valid,
            n_test=self.n_test,
            probe=self.probe if env.kind in ("maze", "memory-maze") else None,
        )
        return tuple(
            RunConfig(recipe, group, row, 0, replace(problem, dynamics=preset(row, size)), self.train) for row in rows
        )


Runs = tuple[RunConfig, ...]

MICRO = Scale(
    Size(64, 2, d_state=64, hidden=128, latent=LatentConfig(groups=16, classes=16)),
    TrainConfig(steps=2000, lr=3e-3, warmup_steps=100, log_every=20, eval_every=400, checkpoint_every=500),
    grid="tiles",
    side=16,
    depth=16,
    batch_size=16,
    n_episodes=4096,
    n_pictured=1024,
    n_valid=64,
    n_test=256,
    probe=Probe.Config(hidden=256, n_hidden=2, steps=500),
)
MINI = Scale(
    Size(128, 2, d_state=64, hidden=256, latent=LatentConfig(groups=32, classes=16)),
    TrainConfig(steps=10_000, lr=2e-3, warmup_steps=200, log_every=50, eval_every=1000, checkpoint_every=500),
    grid="tiles",
    side=32,
    depth=16,
    batch_size=16,
    n_episodes=8192,
    n_pictured=2048,
    n_valid=128,
    n_test=512,
    probe=Probe.Config(hidden=512, n_hidden=3, steps=2000),
)
PAPER = Scale(
    Size(512, 3, d_state=64, hidden=512, latent=LatentConfig(groups=32, classes=32), n_keys=64),
    TrainConfig(
        steps=20_000,
        lr=1e-3,
        warmup_steps=500,
        clip=100.0,
        autocast="bf16",
        log_every=50,
        eval_every=2000,
        checkpoint_every=500,
    ),
    grid="pixels",
    side=64,
    depth=32,
    batch_size=8,
    n_episodes=8000,
    n_pictured=4000,
    n_valid=1000,
    n_test=1000,
    probe=Probe.Config(),
)


def worlds_micro() -> FaceOff:
    """One environment of each family, small enough to be learned in minutes: about an hour for a seed on two cores."""
    groups = (
        ("distracting-memory-20", DistractingMemory.Config(20, p_distractor=0.2, n_colours=2), 16),
        ("multi-doors-keys-2", MultiDoorsKeys.Config(2), 32),
        ("two-rooms", Rooms.Config("two"), 64),
        ("two-rooms-teleport", Rooms.Config("two", teleport=True), 64),
    )
    return _together("worlds-micro", "Four memory worlds, small models", MICRO, groups)


def worlds_mini() -> FaceOff:
    """The smallest standard size of each family."""
    names = ("distracting-memory-100", "multi-doors-keys-3", "two-rooms", "two-rooms-teleport")
    return _together("worlds-mini", "Four memory worlds", MINI, [(name, ENVS[name], 64) for name in names])


def micro(env: str) -> FaceOff:
    """Small world models on the environment ENV, minutes per row on two cores."""
    return _alone("micro", MICRO, env)


def mini(env: str) -> FaceOff:
    """Middling world models on the environment ENV: hours per row on two cores, minutes on a GPU."""
    return _alone("mini", MINI, env)


def paper(env: str) -> FaceOff:
    """World models of the published size on the environment ENV, for a GPU."""
    return _alone("paper", PAPER, env)


def _alone(scale_name: str, scale: Scale, env: str) -> FaceOff:
    config = find(env)
    name = f"worlds-{scale_name}-{env}"
    return FaceOff(name, f"World models on {env}, {scale_name} size", scale.runs(name, env, config))


def _together(name: str, title: str, scale: Scale, groups: Sequence[tuple[str, EnvConfig, int]]) -> FaceOff:
    runs = [run for group, env, window in groups for run in scale.runs(name, group, env, window=window)]
    return FaceOff(name, title, tuple(runs))
