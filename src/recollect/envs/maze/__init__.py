"""First-person mazes, on the renderer and the motion of the rooms."""

from __future__ import annotations

from recollect.envs.maze.env import Maze

__all__ = ["Maze"]
