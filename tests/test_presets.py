"""World models by name and the recipes that compare them: equal sizes, one difference."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recollect.core.errors import ConfigError
from recollect.layers.hax import HAX
from recollect.models.presets import PRESETS, Size, preset
from recollect.models.s4wm import S4WM
from recollect.models.world_model import WorldModel
from recollect.recipes import load_recipe
from recollect.recipes.worlds import FEWER_ROWS, MICRO, MINI, PAPER, ROWS
from recollect.train.run import FaceOff
from recollect.train.world import WorldConfig


def parameters(problem: WorldConfig) -> int:
    return sum(p.numel() for p in WorldModel(problem.model()).parameters())


def problems(faceoff: FaceOff) -> dict[str, dict[str, WorldConfig]]:
    """By group and row."""
    found: dict[str, dict[str, WorldConfig]] = {}
    for run in faceoff.runs:
        assert isinstance(run.problem, WorldConfig)
        found.setdefault(run.group, {})[run.row] = run.problem
    return found


@pytest.mark.parametrize("name", ["worlds-micro", "worlds-mini-four-rooms", "worlds-paper-distracting-memory-100"])
def test_rows_differ_in_their_memory_and_have_equally_many_parameters(name: str) -> None:
    for rows in problems(load_recipe(name)).values():
        assert tuple(rows) == (FEWER_ROWS if name == "worlds-micro" else ROWS)
        first = rows["s4wm"]
        counts = {row: parameters(problem) for row, problem in rows.items()}
        assert all(replace(problem, dynamics=first.dynamics) == first for problem in rows.values())
        assert max(counts.values()) < 1.1 * min(counts.values()), counts


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_matches_at_other_sizes(name: str) -> None:
    for size in (Size(32, 1, d_state=16, hidden=64), Size(96, 3, hidden=96)):
        built, other = (preset(row, size).build(64, 3) for row in (name, "s4wm"))
        counts = [sum(p.numel() for p in module.parameters()) for module in (built, other)]
        assert counts[0] == pytest.approx(counts[1], rel=0.15)


def test_baselines_remember_as_far_as_their_window() -> None:
    for rows in problems(load_recipe("worlds-micro")).values():
        reach = {row: problem.dynamics for row, problem in rows.items()}
        tssm = reach["tssm"]
        assert isinstance(tssm, S4WM.Config)
        windows = [layer.window for layer in tssm.backbone.layers if layer.kind == "transformer_xl"]
        assert set(windows) == {reach["rssm"].chunk}
        context = rows["rssm"].env.context_length
        assert max(windows) < context
        assert all(reach[row].chunk is None for row in rows if row != "rssm")


def test_attention_compares_one_input_and_several_in_turn() -> None:
    dynamics = preset("haxwm", Size(n_blocks=3))
    assert isinstance(dynamics, S4WM.Config)
    attention = [layer for layer in dynamics.backbone.layers if isinstance(layer, HAX.Config)]
    assert [layer.span for layer in attention] == [1, 8, 1]
    assert all(layer.follow and layer.qk == "sketch" for layer in attention)
    assert {layer.attention.patterns[0].budget for layer in attention} == {48}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown world model 's4w'.*s4wm"):
        preset("s4w", Size())
    with pytest.raises(ConfigError, match=r"unknown environment 'two-room'.*two-rooms"):
        load_recipe("worlds-mini-two-room")


def test_scales_grow() -> None:
    widths = [scale.size.d_model for scale in (MICRO, MINI, PAPER)]
    assert widths == sorted(widths)
