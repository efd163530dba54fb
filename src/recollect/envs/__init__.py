"""Environments that measure memory, with the scripted policies that visit them.

A new environment is one file, a ``MemoryEnv`` with a nested ``EnvConfig``, and one line of ``ENVS`` for each of its
standard sizes.
"""

from __future__ import annotations

from typing import Any

from recollect.core.errors import ConfigError, nearest
from recollect.envs.base import EnvConfig, Frames, MemoryEnv
from recollect.envs.distracting_memory import DistractingMemory
from recollect.envs.maze import Maze
from recollect.envs.memory_maze import MemoryMaze
from recollect.envs.multi_doors_keys import MultiDoorsKeys
from recollect.envs.rooms import Rooms

ENVS: dict[str, EnvConfig] = {
    "distracting-memory-100": DistractingMemory.Config(100),
    "distracting-memory-200": DistractingMemory.Config(200),
    "distracting-memory-400": DistractingMemory.Config(400),
    "multi-doors-keys-3": MultiDoorsKeys.Config(3),
    "multi-doors-keys-5": MultiDoorsKeys.Config(5),
    "multi-doors-keys-7": MultiDoorsKeys.Config(7),
    "two-rooms": Rooms.Config("two"),
    "four-rooms": Rooms.Config("four"),
    "ten-rooms": Rooms.Config("ten"),
    "two-rooms-teleport": Rooms.Config("two", teleport=True),
    "four-rooms-teleport": Rooms.Config("four", teleport=True),
    "ten-rooms-teleport": Rooms.Config("ten", teleport=True),
    "maze-9x9": Maze.Config(9),
    "maze-15x15": Maze.Config(15),
    "memory-maze-9x9": MemoryMaze.Config(9),
    "memory-maze-11x11": MemoryMaze.Config(11),
    "memory-maze-13x13": MemoryMaze.Config(13),
    "memory-maze-15x15": MemoryMaze.Config(15),
}
"""What each environment is by default; sizes are the config's, to be replaced: ``replace(config, width=50)``."""


def find(name: str) -> EnvConfig:
    """The config of that name. Raises ConfigError naming the nearest known one."""
    if name not in ENVS:
        raise ConfigError(f"unknown environment '{name}'{nearest(name, ENVS)}")
    return ENVS[name]


def register() -> None:
    """Make every environment known to ``gymnasium.make``, as ``recollect/distracting-memory-100-v0``."""
    import gymnasium

    for name, config in ENVS.items():
        if f"recollect/{name}-v0" not in gymnasium.registry:
            build: Any = config.build
            gymnasium.register(id=f"recollect/{name}-v0", entry_point=build)


__all__ = [
    "ENVS",
    "DistractingMemory",
    "EnvConfig",
    "Frames",
    "Maze",
    "MemoryEnv",
    "MemoryMaze",
    "MultiDoorsKeys",
    "Rooms",
    "find",
    "register",
]
