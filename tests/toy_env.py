"""A tiny world of pictures: fast, with small blocks and trouble on demand. Also a program that is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from recollect.core.errors import DataError
from recollect.data import collect
from recollect.envs.base import EnvConfig, Frames, MemoryEnv, Observation

SIDE = 8


class ToyEnv(MemoryEnv):
    """A dot that goes left and right; reward where it leaves."""

    @dataclass(frozen=True)
    class Config(EnvConfig, kind="toy-pictures"):
        """A dot on a line, for tests."""

        actions: ClassVar[tuple[str, ...]] = ("left", "right", "sing")
        observation: ClassVar[Observation] = "image"
        block_episodes: ClassVar[int] = 4
        constant: ClassVar[tuple[str, ...]] = ("layout",)

        length: int = 6
        pause_s: float = 0.0
        trouble: str = ""
        """What goes wrong in the third block: "die", "raise" or "change"."""

        @property
        def context_length(self) -> int:
            return self.length - 2

        @property
        def query_length(self) -> int:
            return 2

        @property
        def observation_shape(self) -> tuple[int, ...]:
            return (SIDE, SIDE, 3)

        def build(self, *, pixels: bool = False, render_mode: str | None = None) -> ToyEnv:
            del pixels
            return ToyEnv(self, render_mode)

        def generate(self, rng: np.random.Generator, n_episodes: int) -> Frames:
            time.sleep(self.pause_s)
            n, T = n_episodes, self.length
            marks = np.zeros((3, n, T), dtype=np.bool_)
            marks[0, :, 0] = marks[1, :, -1] = True
            marks[2, :, -1] = rng.random(n) < 0.5
            layout = np.repeat(rng.integers(0, 9, (n, 1, 3), dtype=np.uint8), T, axis=1)
            if self.trouble == "change":
                layout[0, -1] += 1
            if self.trouble == "raise":
                raise DataError("the toy is broken")
            if self.trouble == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            return {
                "image": rng.integers(0, 256, (n, T, SIDE, SIDE, 3), dtype=np.uint8),
                "action": rng.integers(0, 3, (n, T), dtype=np.uint8) * ~marks[0],
                "reward": marks[2].astype(np.float32),
                "is_first": marks[0],
                "is_last": marks[1],
                "is_terminal": marks[2],
                "layout": layout,
                "speed": rng.random((n, T, 2)),
            }

        def oracle(self, frames: Frames) -> dict[str, float]:
            del frames
            return {}

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "ansi"]}  # noqa: RUF012

    def __init__(self, config: Config | None = None, render_mode: str | None = None) -> None:
        self.config = config or ToyEnv.Config()
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(3)
        self.observation_space = spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed, options=options)
        self._x, self._t = SIDE // 2, 0
        return self._picture(), {}

    def step(self, action: Any) -> Any:
        self._x += {0: -1, 1: 1, 2: 0}[int(action)]
        self._t += 1
        out = not 0 <= self._x < SIDE
        return self._picture(), float(out), out, self._t >= 20, {}

    def render(self) -> Any:
        return f"dot at {self._x}\n" if self.render_mode == "ansi" else self._picture()

    def hidden_state(self) -> dict[str, Any]:
        return {"x": self._x, "map": np.eye(2)}

    def scripted_actions(self) -> Any:
        return np.ones(self.config.length - 1, dtype=np.uint8)

    def _picture(self) -> np.ndarray:
        picture = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        picture[SIDE // 2, self._x % SIDE] = 255
        return picture


BLOCKS = 60
"""How many blocks the program below writes."""


def slow_store(path: Path, workers: int, pause_s: float = 0.0) -> None:
    """Write a store. Pauses are no part of the data, but of the config."""
    config = ToyEnv.Config(length=5, pause_s=pause_s)
    collect(config, 4 * BLOCKS - 1, 0, path, workers=workers)


if __name__ == "__main__":
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    slow_store(Path(sys.argv[1]), int(sys.argv[2]), 0.002)
