"""Playing an environment with keys, or watching its scripted policy, on whatever screen there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from recollect.envs.base import EnvConfig
from recollect.envs.tiles import Bytes

USUAL = {
    "left": "a",
    "right": "d",
    "forward": "w",
    "up": "w",
    "backward": "s",
    "back": "s",
    "down": "s",
    "none": "x",
    "noop": "x",
    "forward-left": "q",
    "forward-right": "e",
    "pickup": "f",
    "open": "o",
    "toggle": "o",
    "drop": "g",
}
"""Keys of actions that environments commonly have; every action also has its number."""
ARROWS = {"arrow-up": "w", "arrow-left": "a", "arrow-right": "d", "arrow-down": "s"}
NEW, HIDDEN, LEAVE = "r", "h", "escape"


class Screen(Protocol):
    """Where a game is shown and keys come from."""

    shows_text: bool
    """Whether ``ansi`` text is welcome instead of a picture."""

    def show(self, picture: Bytes | str, lines: list[str]) -> None:
        """A picture (h, w, 3), or text, with lines below it."""
        ...

    def key(self, timeout_s: float | None) -> str | None:
        """The next key, ``escape`` also where the screen was closed; None when none came in time."""
        ...


class Game:
    """An environment, the keys of its actions, and what has happened so far."""

    def __init__(self, config: EnvConfig, name: str, *, seed: int = 0, script: bool = False) -> None:
        self.config, self.name = config, name
        self._seed: int | None = seed
        self._script = script
        self._hidden = False
        self.keys = keys_of(config.actions)

    def run(self, screen: Screen, *, fps: float) -> None:
        """Play until the player leaves. Raises what the environment raises."""
        env = self.config.build()
        text = screen.shows_text and "ansi" in env.metadata.get("render_modes", ())
        env.close()
        env = self.config.build(render_mode="ansi" if text else "rgb_array")
        try:
            while self._episode(env, screen, fps):
                pass
        finally:
            env.close()

    def _episode(self, env: Any, screen: Screen, fps: float) -> bool:
        """One episode; False when the player leaves."""
        env.reset(seed=self._seed)
        self._seed = None
        script: Iterator[int] = iter(env.scripted_actions().tolist() if self._script else ())
        step, total, over, last = 0, 0.0, False, "start"
        planned = next(script, None)
        while True:
            part = "context" if step < self.config.context_length else "query"
            state = f"{self.name}   step {step} {part if self._script else ''}   {last}   reward {total:g}"
            lines = [state + ("   the end: r for another" if over else ""), self.help()]
            lines += told(env.hidden_state()) if self._hidden else []
            screen.show(env.render(), lines)
            watching = planned is not None and not over
            key = screen.key(1 / fps if watching else None)
            if key == LEAVE or (key == "q" and "q" not in self.keys):
                return False
            if key == NEW:
                return True
            if key == HIDDEN:
                self._hidden = not self._hidden
                continue
            action = self.keys.get(ARROWS.get(key, key)) if key is not None else None
            if watching:
                if key is not None:
                    continue
                action, planned = planned, next(script, None)
            if over or action is None:
                continue
            _, reward, terminated, truncated, _ = env.step(action)
            step, total, over = step + 1, total + float(reward), bool(terminated or truncated)
            last = self.config.actions[action]

    def help(self) -> str:
        """Which key does what."""
        letters = {action: key for key, action in reversed(self.keys.items())}
        actions = [f"{letters[i]} {name}" for i, name in enumerate(self.config.actions)]
        leave = "esc leave" if "q" in self.keys else "q leave"
        return "  ".join([*([] if self._script else actions), f"{NEW} new", f"{HIDDEN} hidden state", leave])


def keys_of(actions: tuple[str, ...]) -> dict[str, int]:
    """Key -> action: letters where names are the usual ones, and the action's number."""
    keys: dict[str, int] = {}
    for i, name in enumerate(actions):
        letter = USUAL.get(name.replace("_", "-").removeprefix("turn-").removeprefix("move-"))
        if letter is not None and letter not in keys:
            keys[letter] = i
    for i in range(min(10, len(actions))):
        keys[str(i)] = i
    return keys


def told(state: dict[str, Any]) -> list[str]:
    """Hidden state in lines."""
    lines: list[str] = []
    for name, value in state.items():
        array: npt.NDArray[Any] = np.asarray(value)
        lines += f"{name}: {np.array2string(array, precision=2, threshold=300)}".splitlines()
    return lines
