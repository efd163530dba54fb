"""Configs, seed streams and state trees: the contracts every room is built on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recollect.core.config import Config, differences, dumps, fingerprint, from_dict, override, to_dict
from recollect.core.errors import ConfigError, RecollectError, nearest
from recollect.core.seeding import STREAMS, Streams
from recollect.core.state import detach, index_batch, leaves, map_state, nbytes, where_reset


@dataclass(frozen=True)
class Part(Config):
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError(f"size must not be negative, got {self.size}")


@dataclass(frozen=True)
class Wheel(Part, kind="test-wheel"):
    spokes: int = 4


@dataclass(frozen=True)
class Wing(Part, kind="test-wing"):
    span: float = 1.0


@dataclass(frozen=True)
class Machine(Config, kind="test-machine"):
    part: Part
    name: str = "m"
    lr: float = 0.1
    limit: float | None = None
    mode: Literal["slow", "fast"] = "slow"
    pair: tuple[int, float] = (1, 2.0)
    parts: tuple[Part, ...] = ()
    loud: bool = False
    table: dict[str, int] | None = None


MACHINE = Machine(Wheel(2), parts=(Wing(1, 2.5), Wheel()), table={"a": 1})


def test_a_config_reads_back_as_what_it_was() -> None:
    assert from_dict(Machine, json.loads(dumps(MACHINE))) == MACHINE
    assert from_dict(Config, to_dict(MACHINE)) == MACHINE, "the kind alone finds the class"


@given(size=st.integers(0, 99), lr=st.floats(allow_nan=False, allow_infinity=False), name=st.text(), loud=st.booleans())
def test_any_config_reads_back(size: int, lr: float, name: str, loud: bool) -> None:
    machine = Machine(Wing(size), name=name, lr=lr, loud=loud)
    assert from_dict(Machine, json.loads(dumps(machine))) == machine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, r"config: unknown key 'nmae'; did you mean 'name'\?"),
        ({"part": {"kind": "test-weel"}}, r"config\.part: unknown kind 'test-weel'; did you mean 'test-wheel'\?"),
        ({"part": {"kind": "test-machine"}}, r"config\.part: unknown kind 'test-machine'"),
        ({"part": 3}, r"config\.part: expected the keys of Part, got 3"),
        ({"lr": "fast"}, r"config\.lr: expected float, got 'fast'"),
        ({"loud": 1}, r"config\.loud: expected bool, got 1"),
        ({"name": True}, r"config\.name: expected str, got True"),
        ({"mode": "medium"}, r"config\.mode: 'medium' is not one of 'slow', 'fast'"),
        ({"pair": [1]}, r"config\.pair: expected 2 values, got 1"),
        ({"parts": [{"kind": "test-wheel", "size": -1}]}, "size must not be negative, got -1"),
        ({"table": [1]}, r"config\.table: expected a mapping"),
    ],
)
def test_nothing_is_guessed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_dict(Machine, {**to_dict(MACHINE), **change})
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_an_error() -> None:
    with pytest.raises(ConfigError, match="part"):
        from_dict(Machine, {"kind": "test-machine"})


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("lr=1e-3", ("lr",), 1e-3),
        ("lr=2", ("lr",), 2.0),
        ("name=123", ("name",), "123"),
        ("name=a=b", ("name",), "a=b"),
        ("name=", ("name",), ""),
        ("limit=null", ("limit",), None),
        ("limit=3", ("limit",), 3.0),
        ("loud=true", ("loud",), True),
        ("loud=True", ("loud",), True),
        ("mode=fast", ("mode",), "fast"),
        ("part.spokes=9", ("part", "spokes"), 9),
        ("parts.0.span=4", ("parts", 0, "span"), 4.0),
        ("parts.-1.spokes=5", ("parts", -1, "spokes"), 5),
        ("pair.1=3", ("pair", 1), 3.0),
        ("pair=[7, 8]", ("pair",), (7, 8.0)),
        ("table.a=5", ("table", "a"), 5),
        ('part={"kind": "test-wing", "span": 3}', ("part",), Wing(span=3.0)),
    ],
)
def test_overrides_reach_any_depth(assignment: str, path: tuple[Any, ...], value: Any) -> None:
    found: Any = override(MACHINE, [assignment])
    for step in path:
        found = getattr(found, step) if isinstance(step, str) and not isinstance(found, dict) else found[step]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lrr=1", r"override 'lrr': unknown key 'lrr'; did you mean 'lr'\?"),
        ("part.spoke=1", r"unknown key 'spoke'; did you mean 'spokes'\?"),
        ("lr.x=1", "'x' is below a value that has no keys"),
        ("parts.7.size=1", "'7' is not an index below 2"),
        ("part.spokes=1.5", r"override 'part\.spokes': expected int, got '?1\.5"),
        ("part.size=-3", "must not be negative"),
        ("lr", "is not of the form key=value"),
        ("=1", "is not of the form key=value"),
        ("table.b=1", "unknown key 'b'"),
    ],
)
def test_overrides_are_strict(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(MACHINE, [assignment])


def test_a_fingerprint_changes_with_any_value_and_with_nothing_else() -> None:
    seen = {
        fingerprint(override(MACHINE, [a])) for a in ("lr=1", "part.size=7", "parts.1.spokes=5", "name=n", "lr=0.1")
    }
    assert len(seen | {fingerprint(MACHINE)}) == 5, "lr=0.1 is what it was"
    assert fingerprint(from_dict(Machine, json.loads(dumps(MACHINE)))) == fingerprint(MACHINE)
    assert fingerprint(Machine(Wheel(1))) != fingerprint(Machine(Wing(1)))


def test_differences_name_the_keys() -> None:
    changed = override(MACHINE, ["lr=1", "parts.0.span=9"])
    assert differences(to_dict(MACHINE), to_dict(changed)) == ["lr: 0.1 -> 1.0", "parts.0.span: 2.5 -> 9.0"]
    assert differences(to_dict(MACHINE), to_dict(MACHINE)) == []


def test_nearest() -> None:
    assert nearest("mamba3", ["mamba2", "gru"]) == "; did you mean 'mamba2'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert issubclass(ConfigError, RecollectError)


def test_streams_are_addressed_and_not_consumed() -> None:
    streams = Streams(7)
    first = streams.numpy("data", "train", 3).random(4)
    streams.numpy("data", "train", 2).random(100)
    np.testing.assert_array_equal(streams.numpy("data", "train", 3).random(4), first)
    assert torch.equal(
        torch.randn(3, generator=streams.torch("init")), torch.randn(3, generator=Streams(7).torch("init"))
    )


def test_streams_never_meet() -> None:
    addresses: list[tuple[Any, ...]] = [(name, *rest) for name in STREAMS for rest in ((), (1,), ("1",), (1, 1), (11,))]
    numbers = [Streams(seed).number(*address) for seed in (0, 1, -1) for address in addresses]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 2**63 for number in numbers)
    with pytest.raises(ConfigError, match="did you mean 'data'"):
        Streams(0).number("date")


class Inner(NamedTuple):
    a: Tensor
    b: Tensor


class Outer(NamedTuple):
    x: Tensor
    inner: tuple[Inner, ...]


def state(offset: float = 0.0) -> Outer:
    return Outer(
        torch.arange(3.0) + offset,
        (Inner(torch.ones(3, 2) + offset, torch.zeros(3, 2, 2, dtype=torch.float64) + offset),),
    )


def test_states_are_walked_in_order_and_keep_their_types() -> None:
    assert [name for name, _ in leaves(state())] == ["x", "inner.0.a", "inner.0.b"]
    doubled = map_state(lambda leaf: leaf * 2, state())
    assert isinstance(doubled, Outer)
    assert isinstance(doubled.inner[0], Inner)
    assert torch.equal(doubled.x, torch.tensor([0.0, 2.0, 4.0]))
    assert nbytes(state()) == 3 * 4 + 6 * 4 + 12 * 8
    with pytest.raises(TypeError, match="dict"):
        map_state(lambda leaf: leaf, {"x": torch.zeros(1)})


def test_a_reset_replaces_its_rows_only_and_writes_to_nothing() -> None:
    old, fresh = state(), state(10.0)
    mixed = where_reset(torch.tensor([True, False, True]), fresh, old)
    assert torch.equal(mixed.x, torch.tensor([10.0, 1.0, 12.0]))
    assert torch.equal(mixed.inner[0].b[1], old.inner[0].b[1])
    assert torch.equal(mixed.inner[0].b[2], fresh.inner[0].b[2])
    assert torch.equal(old.x, state().x)


def test_rows_are_picked_and_gradients_cut() -> None:
    picked = index_batch(state(), torch.tensor([2, 2, 0, 1]))
    assert torch.equal(picked.x, torch.tensor([2.0, 2.0, 0.0, 1.0]))
    assert picked.inner[0].b.shape == (4, 2, 2)
    live = Inner(torch.ones(1, requires_grad=True) * 2, torch.ones(1))
    assert live.a.requires_grad
    assert not detach(live).a.requires_grad
