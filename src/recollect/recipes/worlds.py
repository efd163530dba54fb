"""The world-model face-off: models that differ in their memory only, on environments that ask for one.

``worlds-micro``: four environments, one of each family, at sizes that two CPU cores go through in an hour. The grid
worlds are learned in it; the rooms are not, and show what the same models make of pictures by then.
``worlds-micro-grid``: the grid worlds alone, on three seeds.
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
from recollect.envs.rooms.scene import SIZE
from recollect.envs.rooms.walk import FirstPersonConfig
from recollect.models.latent import LatentConfig
from recollect.models.presets import Size, preset
from recollect.models.probe import Probe
from recollect.train.run import FaceOff, RunConfig, TrainConfig
from recollect.train.world import WorldConfig

ROWS = ("rssm", "tssm", "s4wm", "s4dwm", "s5wm", "mambawm", "mamba2wm", "haxwm")

FEWER_ROWS = ("rssm", "tssm", "s4wm", "s5wm", "mamba2wm", "haxwm")
"""Of ``worlds-micro``, where four environments share an hour."""


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
    window: int = 64
    """Steps that the recurrent baseline's gradients and the Transformer-XL's memory reach back."""
    slower: frozenset[str] = frozenset()
    """Rows that learn better at a third of the rate."""
    frames_at_once: int = 4096

    def runs(
        self, recipe: str, group: str, env: EnvConfig, rows: Sequence[str] = ROWS, longer: EnvConfig | None = None
    ) -> Runs:
        """One run for each of ``rows`` on an environment, tested on a ``longer`` one too."""
        size = replace(self.size, window=self.window, chunk=self.window)
        pictures = env.observation == "image"
        if isinstance(env, FirstPersonConfig):
            env = replace(env, side=self.side)
        tiles = self.grid == "tiles" and not pictures
        problem = WorldConfig(
            env,
            preset("s5wm", size),
            observation="tiles" if tiles else "pixels",
            hidden=size.hidden,
            depth=self.depth,
            batch_size=self.batch_size,
            frames_at_once=self.frames_at_once,
            # Of squares of a picture 64 wide: each stands for so many pixels.
            image_weight=(SIZE / self.side) ** 2 if isinstance(env, FirstPersonConfig) else 1.0,
            # The likelihood of tiles is in nats as the KL is, not in squared pixels: what one spares is not free.
            free_nats=0.1 if tiles else 1.0,
            # Of all frames of an episode only the last is asked: in a mean over frames its reward would not be heard.
            reward_weight=env.episode_length / 2 if env.rewarded else 0.0,
            continue_weight=1.0 if env.rewarded else 0.0,
            n_episodes=self.n_pictured if pictures else self.n_episodes,
            n_valid=self.n_valid,
            n_test=self.n_test,
            longer=longer,
            probe=self.probe if env.kind in ("maze", "memory-maze") else None,
        )
        # The error of a picture is a sum over thousands of numbers, and so are its gradients.
        train = replace(self.train, clip=100.0) if pictures else self.train
        third = replace(train, lr=train.lr / 3)
        return tuple(
            RunConfig(
                recipe,
                group,
                row,
                0,
                replace(problem, dynamics=preset(row, size)),
                third if row in self.slower else train,
            )
            for row in rows
        )


Runs = tuple[RunConfig, ...]
Part = tuple[str, EnvConfig, Scale, EnvConfig | None]
"""A group: its name, what is trained on and how, and what is tested on as well."""

MICRO = Scale(
    Size(64, 2, d_state=64, hidden=128, latent=LatentConfig(groups=16, classes=16)),
    TrainConfig(steps=4000, lr=6e-3, warmup_steps=100, log_every=20, eval_every=500, checkpoint_every=500),
    grid="tiles",
    side=16,
    depth=8,
    batch_size=4,
    n_episodes=4096,
    n_pictured=1024,
    n_valid=64,
    n_test=256,
    probe=Probe.Config(hidden=256, n_hidden=2, steps=500),
)


def _trained(
    scale: Scale, *, steps: int, batch_size: int, lr: float = 6e-3, window: int = 64, slower: Sequence[str] = ()
) -> Scale:
    """The scale with as much training as an environment needs, validated eight times on the way."""
    train = replace(scale.train, steps=steps, lr=lr, eval_every=-(-steps // 8))
    return replace(scale, train=train, batch_size=batch_size, window=window, slower=frozenset(slower))


HALLWAY = _trained(MICRO, steps=1500, batch_size=16, window=16)
DOORS = _trained(MICRO, steps=4000, batch_size=4, window=32, slower=("tssm",))
"""Of ``MICRO``, with the training and the reach that two tries of every row chose for the grid worlds."""

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
    Size(512, 3, d_state=64, hidden=512, latent=LatentConfig(groups=32, classes=32), n_keys=128),
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
    """One environment of each family, small models: about an hour for a seed on two cores."""
    rooms = _trained(MICRO, steps=400, batch_size=4, lr=4e-3)
    teleport = _trained(MICRO, steps=1000, batch_size=8, lr=4e-3)
    parts: tuple[Part, ...] = (
        *_micro_grid(),
        ("two-rooms", Rooms.Config("two"), rooms, None),
        ("two-rooms-teleport", Rooms.Config("two", teleport=True), teleport, None),
    )
    return _together("worlds-micro", "Four memory worlds, small models", parts, FEWER_ROWS)


def worlds_micro_grid() -> FaceOff:
    """The two worlds of ``worlds-micro`` that are learned in it, on three seeds: half an hour for each on two cores."""
    name = "worlds-micro-grid"
    return replace(_together(name, "Two memory worlds, small models", _micro_grid(), FEWER_ROWS), seeds=(0, 1, 2))


def _micro_grid() -> tuple[Part, ...]:
    return (
        ("distracting-memory-20", _hallway(20), HALLWAY, _hallway(40)),
        ("multi-doors-keys-2", MultiDoorsKeys.Config(2), DOORS, MultiDoorsKeys.Config(3)),
    )


def worlds_mini() -> FaceOff:
    """The smallest standard size of each family."""
    names = ("distracting-memory-100", "multi-doors-keys-3", "two-rooms", "two-rooms-teleport")
    return _together("worlds-mini", "Four memory worlds", [(name, ENVS[name], MINI, None) for name in names], ROWS)


def micro(env: str) -> FaceOff:
    """Small world models on the environment ENV, minutes per row on two cores."""
    scale = {"distracting-memory": HALLWAY, "multi-doors-keys": DOORS}.get(find(env).kind, MICRO)
    return _alone("micro", scale, env)


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


def _hallway(width: int) -> EnvConfig:
    """Two colours and few distractors, so that the hallway takes minutes to learn."""
    return DistractingMemory.Config(width, p_distractor=0.2, n_colours=2)


def _together(name: str, title: str, parts: Sequence[Part], rows: Sequence[str]) -> FaceOff:
    runs = [run for group, env, scale, longer in parts for run in scale.runs(name, group, env, rows, longer)]
    return FaceOff(name, title, tuple(runs))
