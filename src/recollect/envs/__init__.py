"""Environments that measure memory, with the scripted policies that visit them.

A new environment is one file and one line of ``ENVS``: a ``gymnasium.Env`` with a nested ``Config``, its number
``n_actions``, and a static ``generate(config, rng, n_episodes)`` that returns arrays (n, T, ...), time second.
"""

from __future__ import annotations

from typing import Any

from recollect.core.errors import ConfigError, nearest
from recollect.envs.distracting_memory import DistractingMemory

ENVS: dict[str, type[Any]] = {
    "distracting-memory": DistractingMemory,
}


def find(name: str) -> type[Any]:
    """The environment of that name. Raises ConfigError naming the nearest known one."""
    if name not in ENVS:
        raise ConfigError(f"unknown environment '{name}'{nearest(name, ENVS)}")
    return ENVS[name]


def register() -> None:
    """Make every environment known to ``gymnasium.make``, as ``recollect/DistractingMemory-v0``. Repeats do no harm."""
    import gymnasium

    for env in ENVS.values():
        name = f"recollect/{env.__name__}-v0"
        if name not in gymnasium.registry:
            gymnasium.register(id=name, entry_point=f"{env.__module__}:{env.__name__}")


__all__ = ["ENVS", "DistractingMemory", "find", "register"]
