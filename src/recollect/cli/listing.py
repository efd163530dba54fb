"""What ``recollect list`` shows: the registries, read as they stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from recollect.core.config import to_dict

Row = dict[str, Any]


def rows_of(section: str) -> list[Row]:
    """One row per entry of the layers, tasks, envs or recipes, ready for a table or JSON."""
    return SECTIONS[section]()


def _layers() -> list[Row]:
    from recollect.layers import LAYERS

    return [
        {
            "name": name,
            "summary": _summary(layer),
            "config": _defaults(layer.Config),
            "tiny_state_bytes": layer.Config.tiny().state_bytes(),
        }
        for name, layer in LAYERS.items()
    ]


def _tasks() -> list[Row]:
    from recollect.tasks import TASKS

    return [
        {"name": name, "summary": _summary(type(config.build())), "config": to_dict(config)}
        for name, config in TASKS.items()
    ]


def _envs() -> list[Row]:
    from recollect.envs import ENVS

    return [
        {
            "name": name,
            "summary": _summary(type(config)),
            "observation": f"{config.observation} {'x'.join(map(str, config.observation_shape))}",
            "context": config.context_length,
            "query": config.query_length,
            "config": to_dict(config),
        }
        for name, config in ENVS.items()
    ]


def _recipes() -> list[Row]:
    from recollect.recipes import BY_ENVIRONMENT, RECIPES, import_recipe, load_recipe

    rows: list[Row] = []
    for name in RECIPES:
        faceoff = load_recipe(name)
        groups = dict.fromkeys(run.group for run in faceoff.runs)
        members = {group: [run.row for run in faceoff.runs if run.group == group] for group in groups}
        rows.append(
            {
                "name": name,
                "summary": faceoff.title,
                "seeds": list(faceoff.seeds),
                "rows": {group: ",".join(names) for group, names in members.items()},
            }
        )
    for prefix in BY_ENVIRONMENT:
        summary = _summary(import_recipe(f"{prefix}ENV").func)
        rows.append({"name": f"{prefix}ENV", "summary": summary, "seeds": [0], "rows": {"ENV": "as worlds-micro"}})
    return rows


def _summary(entry: type[Any]) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((entry.__doc__ or "").strip().split("\n\n")[0].split()).replace("``", "")


def _defaults(config: type[Any]) -> dict[str, Any]:
    """Every field with its default as JSON data; ``required`` where it has none."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            found[field.name] = to_dict(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = to_dict(field.default_factory())
        else:
            found[field.name] = "required"
    return found


SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "layers": _layers,
    "tasks": _tasks,
    "envs": _envs,
    "recipes": _recipes,
}
