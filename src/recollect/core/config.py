"""Frozen dataclass configs: to and from plain dicts, strict overrides, fingerprints.

A config is a frozen dataclass deriving from ``Config`` with a ``kind``: ``class Config(LayerConfig, kind="gru")``.
The kind is written as the key ``"kind"``, so a field may be declared by a base class and still read back as what it
was. Nothing is ever guessed: an unknown key, kind or type is an error that names the nearest known one.
"""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, Union

from recollect.core.errors import ConfigError, nearest

KINDS: dict[str, type[Config]] = {}


@dataclass(frozen=True)
class Config:
    """Base of every config. Subclass with ``kind="..."``; the name must be unique across the package."""

    kind: ClassVar[str] = ""

    def __init_subclass__(cls, kind: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind:
            cls.kind = kind
            KINDS[kind] = cls


C = TypeVar("C", bound=Config)


def to_dict(config: Any) -> Any:
    """Plain JSON data: dicts (with ``kind`` where there is one), lists, numbers, strings."""
    if is_dataclass(config) and not isinstance(config, type):
        kind = getattr(config, "kind", "")
        data: dict[str, Any] = {"kind": kind} if kind else {}
        return data | {f.name: to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def from_dict(cls: type[C], data: Any, where: str = "config") -> C:
    """The config that ``to_dict`` wrote. Every key must be known and every value of its declared type."""
    return _decode(cls, data, where)


def dumps(config: Any) -> str:
    """Indented JSON with sorted keys."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True)


def fingerprint(config: Any) -> str:
    """Twelve hex digits that change whenever any value of the config does."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def override(config: C, assignments: Iterable[str]) -> C:
    """Apply ``key=value`` strings with dotted keys: ``override(run, ["train.lr=1e-3", "model.layers.0.d_state=16"])``.

    Raises ConfigError naming the nearest key when one is unknown, and the expected type when a value does not fit.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"override '{assignment}' is not of the form key=value")
        config = _set(config, key.split("."), text, key)
    return config


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Dotted keys at which two ``to_dict`` trees differ, as ``key: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{where}.{i}")]
    return [] if old == new else [f"{where}: {old} -> {new}"]


def _set(node: Any, path: list[str], text: str, where: str) -> Any:
    head, rest = path[0], path[1:]
    if isinstance(node, tuple):
        if not head.lstrip("-").isdigit() or not -len(node) <= int(head) < len(node):
            raise ConfigError(f"override '{where}': '{head}' is not an index below {len(node)}")
        items = list(node)
        index = int(head)
        items[index] = _set(items[index], rest, text, where) if rest else _parse(type(items[index]), text, where)
        return tuple(items)
    if isinstance(node, Mapping):
        if head not in node:
            raise ConfigError(f"override '{where}': unknown key '{head}'{nearest(head, map(str, node))}")
        value = _set(node[head], rest, text, where) if rest else _parse(type(node[head]), text, where)
        return {**node, head: value}
    if not is_dataclass(node) or isinstance(node, type):
        raise ConfigError(f"override '{where}': '{head}' is below a value that has no keys")
    hints = _hints(type(node))
    if head not in hints:
        raise ConfigError(f"override '{where}': unknown key '{head}'{nearest(head, hints)}")
    value = _set(getattr(node, head), rest, text, where) if rest else _parse(hints[head], text, where)
    return replace(node, **{head: value})


def _parse(hint: Any, text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = {"True": True, "False": False, "None": None}.get(text, text)
    try:
        return _decode(hint, value, f"override '{where}'")
    except ConfigError:
        return _decode(hint, text, f"override '{where}'")


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, where)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
    if origin is tuple:
        return _decode_tuple(args, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        return {str(key): _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and is_dataclass(hint):
        return _decode_config(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def _decode_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    messages = []
    for option in options:
        if option is type(None):
            if value is None:
                return None
            continue
        try:
            return _decode(option, value, where)
        except ConfigError as error:
            messages.append(str(error))
    raise ConfigError(messages[0] if messages else f"{where}: unexpected {value!r}")


def _decode_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list, got {value!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if len(args) != len(value):
        raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)}")
    return tuple(_decode(arg, item, f"{where}.{i}") for i, (arg, item) in enumerate(zip(args, value, strict=True)))


def _decode_config(cls: type, value: Any, where: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected the keys of {cls.__qualname__}, got {value!r}")
    data = dict(value)
    kind = data.pop("kind", getattr(cls, "kind", ""))
    if kind and kind != getattr(cls, "kind", ""):
        known = {name for name, other in KINDS.items() if issubclass(other, cls)}
        if kind not in known:
            raise ConfigError(f"{where}: unknown kind '{kind}'{nearest(kind, known)}")
        cls = KINDS[kind]
    hints = _hints(cls)
    for key in data:
        if key not in hints:
            raise ConfigError(f"{where}: unknown key '{key}'{nearest(key, hints)}")
    values = {key: _decode(hints[key], item, f"{where}.{key}") for key, item in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
