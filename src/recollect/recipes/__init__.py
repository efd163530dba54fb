"""Recipes: functions that return a complete FaceOff. Entries are lazy, so that listing them imports nothing heavy.

A recipe of one's own needs no entry here: every command takes ``package.module:function`` as well.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from typing import Any

from recollect.core.errors import ConfigError, nearest
from recollect.train.run import FaceOff

RECIPES: dict[str, str] = {
    "demo": "recollect.recipes.demo:demo",
    "demo-smoke": "recollect.recipes.demo:demo_smoke",
    "recall-micro": "recollect.recipes.recall:recall_micro",
    "recall-mini": "recollect.recipes.recall:recall_mini",
    "recall-published": "recollect.recipes.recall:recall_published",
    "language-micro": "recollect.recipes.language:language_micro",
    "language-mini": "recollect.recipes.language:language_mini",
    "language-smoke": "recollect.recipes.language:language_smoke",
    "worlds-micro": "recollect.recipes.worlds:worlds_micro",
    "worlds-micro-grid": "recollect.recipes.worlds:worlds_micro_grid",
    "worlds-mini": "recollect.recipes.worlds:worlds_mini",
}

BY_ENVIRONMENT: dict[str, str] = {
    "worlds-micro-": "recollect.recipes.worlds:micro",
    "worlds-mini-": "recollect.recipes.worlds:mini",
    "worlds-paper-": "recollect.recipes.worlds:paper",
}
"""Recipes of one argument: the environment, whose name follows the prefix."""


def import_recipe(name: str) -> Any:
    """The function behind a recipe's name, or behind ``module:function``; its module defines the configs it uses.

    Raises ConfigError naming the nearest recipe when there is none of that name.
    """
    target, arguments = RECIPES.get(name, name), ()
    for prefix, taker in BY_ENVIRONMENT.items():
        if name not in RECIPES and name.startswith(prefix):
            target, arguments = taker, (name.removeprefix(prefix),)
    module_name, colon, function_name = target.partition(":")
    if not colon:
        raise ConfigError(f"unknown recipe '{name}'{nearest(name, RECIPES)}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"recipe '{name}': there is no module '{error.name}' on the Python path") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"recipe '{name}': module '{module_name}' has no function '{function_name}'")
    return partial(function, *arguments) if arguments else function


def load_recipe(name: str) -> FaceOff:
    """The face-off of a recipe, each run carrying ``name``, by which it is found again when it is resumed.

    Raises ConfigError when the name is unknown or the function returns something else.
    """
    faceoff = import_recipe(name)()
    if not isinstance(faceoff, FaceOff):
        raise ConfigError(f"recipe '{name}' returned {type(faceoff).__name__}, not a FaceOff")
    return replace(faceoff, runs=tuple(replace(run, recipe=name) for run in faceoff.runs))
