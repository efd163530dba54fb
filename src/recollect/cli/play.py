"""``recollect envs play``."""

from __future__ import annotations

import sys

from recollect.cli.data_arguments import EnvsPlay
from recollect.core.config import override
from recollect.core.errors import ConfigError


def play(command: EnvsPlay) -> int:
    """Play an environment, in the terminal or in a window; returns the exit code."""
    from recollect.envs import find

    env = override(find(command.env), command.overrides)
    if command.fps <= 0:
        raise ConfigError(f"--fps must be positive, got {command.fps}")
    if command.window:
        from recollect.envs.window import Window as Screen
    elif sys.stdin.isatty() and sys.stdout.isatty():
        from recollect.envs.terminal import Terminal as Screen
    else:
        raise ConfigError("playing needs a terminal to read keys from and draw on; use --window, or run it in one")
    from recollect.envs.playing import Game

    game = Game(env, command.env, seed=command.seed, script=command.script)
    with Screen() as screen:
        game.run(screen, fps=command.fps)
    return 0
