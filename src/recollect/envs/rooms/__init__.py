"""First-person rooms, and the renderer and motion that the mazes share."""

from __future__ import annotations

from recollect.envs.rooms.env import Rooms

__all__ = ["Rooms"]
