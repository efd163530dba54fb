"""Which layers are measured, by the name of their row, and at what size: the registry, and variants worth a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import torch

from recollect.core.errors import ConfigError, nearest
from recollect.core.layer import LayerConfig, SequenceLayer
from recollect.layers import LAYERS

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {"attention-full": ("attention", {"window": None})}
"""Further rows: the layer, and the options that differ from its defaults."""


def row_names(words: Sequence[str] = ()) -> list[str]:
    """The layers to measure, as ``chosen``."""
    return chosen(words, [*LAYERS, *VARIANTS], "layer")


def chosen(words: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """The rows to measure, all by default, a name with commas being several. ConfigError for one that is not there."""
    names = [name for word in words for name in word.split(",") if name]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} '{name}'{nearest(name, known)}")
    return list(dict.fromkeys(names or known))


def sizes(words: Sequence[str | int], what: str = "lengths") -> list[int]:
    """Sizes in rising order. A word is a number, several with commas, or ``256..4096``: doubling from one to the other.

    Raises ConfigError for what is not a size of at least 1.
    """
    found: set[int] = set()
    for word in (part for each in words for part in str(each).split(",") if part):
        low, dots, high = word.partition("..")
        try:
            first, last = int(low), int(high if dots else low)
        except ValueError:
            raise ConfigError(f"{what}: '{word}' is neither a number nor a range such as 256..4096") from None
        if first < 1 or last < first:
            raise ConfigError(f"{what}: '{word}' must be at least 1 and rise")
        while first <= last:
            found.add(first)
            first *= 2
    if not found:
        raise ConfigError(f"{what}: at least one is needed")
    return sorted(found)


def config_of(row: str, d_model: int) -> LayerConfig:
    """The config of a row: the layer's defaults at that width; a layer inside it gets the same width."""
    kind, options = VARIANTS.get(row, (row, {}))
    config_class = LAYERS[kind].Config
    inner: dict[str, Any] = {}
    for field in fields(config_class):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if isinstance(default, LayerConfig):
            inner[field.name] = replace(default, d_model=d_model)
    return config_class(d_model, **{**inner, **options})


def refusal(row: str, d_model: int) -> str:
    """Why the row cannot be built at that width; empty when it can."""
    try:
        config_of(row, d_model)
    except ConfigError as error:
        return str(error)
    return ""


def build(row: str, d_model: int, device: torch.device) -> SequenceLayer:
    """The layer of a row, with the same parameters every time."""
    torch.manual_seed(0)
    return config_of(row, d_model).build().to(device)
