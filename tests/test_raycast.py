"""The renderer and the motion of the rooms: against a plain renderer, what hides what, and how a ball rolls."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from plain_renderer import trace, within_one_surface
from recollect.core.errors import ConfigError
from recollect.envs.rooms.layouts import draw_scenes, layout
from recollect.envs.rooms.motion import (
    ACTIONS,
    BALL,
    FORWARD,
    FORWARD_LEFT,
    LEFT,
    NOOP,
    RIGHT,
    replay,
)
from recollect.envs.rooms.renderer import nothing_seen, render
from recollect.envs.rooms.scene import CAMERA_HEIGHT, DOME_RGB, FIRST_WALL, RADIUS, Scene, free_cells, seen_from
from recollect.envs.rooms.textures import LEVELS, TEXELS, textures
from recollect.envs.rooms.walk import ACTIONS as WALK_ACTIONS


def hall(length: int, domes: list[tuple[float, float]], walls: tuple[tuple[int, int], ...] = ()) -> Scene:
    """A free hall of ``length`` x 3 cells, with domes of colours 0, 1, ... and further walls at cells (x, y)."""
    grid = np.full((1, 5, length + 2), FIRST_WALL, dtype=np.uint8)
    grid[0, 1:-1, 1:-1] = 0
    for x, y in walls:
        grid[0, y + 1, x + 1] = FIRST_WALL + 3
    centres = np.array(domes, dtype=np.float32).reshape(1, len(domes), 2)
    return Scene(grid, centres, np.arange(len(domes), dtype=np.uint8)[None])


@pytest.mark.parametrize("pose", [(0.6, 0.6, 0.5), (2.5, 0.4, 0.1), (5.2, 2.2, -2.5), (6.8, 0.15, 2.2)])
def test_pixels_are_those_of_a_plain_renderer(pose: tuple[float, float, float]):
    scene = draw_scenes(layout("two"), np.random.default_rng(3), 1)
    scene.grid[0, 1:3, 1:6] = np.where(scene.grid[0, 1:3, 1:6] == 0, 1, scene.grid[0, 1:3, 1:6])
    picture = render(scene, np.array([pose]))[0].astype(float)
    rng = np.random.default_rng(0)
    met: set[str] = set()
    compared = 0
    for row, column in rng.integers(64, size=(160, 2)).tolist():
        name, colour = trace(scene, pose, row + 0.5, column + 0.5)
        if within_one_surface(scene, pose, row, column, name):
            assert np.abs(picture[row, column] - colour).max() < 0.51, (row, column, name)
            met.add(name[0] if isinstance(name, tuple) else str(name))
            compared += 1
    assert compared > 110
    assert {"floor", "wall", "sky"} <= met


def test_a_dome_behind_a_wall_is_not_seen():
    pose = np.array([[0.5, 1.5, 0.0]])
    wall = ((3, 0), (3, 1), (3, 2))
    hidden, bare = hall(8, [(5.5, 1.5), (6.5, 0.5)], wall), hall(8, [], wall)
    assert (render(hidden, pose) == render(bare, pose)).all()
    open_hall = hall(8, [(5.5, 1.5), (6.5, 0.5)])
    assert (render(open_hall, pose) != render(hall(8, []), pose)).any()


def test_a_wall_hides_just_its_part_of_a_dome():
    pose = np.array([[0.5, 1.5, 0.0]])
    half = render(hall(8, [(5.5, 1.5)], ((3, 1), (3, 2))), pose)[0]  # y above 1 is walled off: the left of the picture
    walled = render(hall(8, [], ((3, 1), (3, 2))), pose)[0]
    whole, bare = render(hall(8, [(5.5, 1.5)]), pose)[0], render(hall(8, []), pose)[0]
    dome = (whole != bare).any(axis=(0, 2))
    left_of_edge = np.arange(64) < 38
    assert (half[:, left_of_edge] == walled[:, left_of_edge]).all()
    assert dome[29:35].all()
    beside = hall(8, [(5.5, 0.7)], ((3, 1), (3, 2)))
    shown = (render(beside, pose)[0] != walled).any(axis=(0, 2))
    free = (render(hall(8, [(5.5, 0.7)]), pose)[0] != bare).any(axis=(0, 2))
    assert 0 < shown.sum() < free.sum()


def test_a_nearer_dome_hides_a_farther_one_in_any_order():
    pose = np.array([[0.5, 1.5, 0.0]])
    near, far = (1.8, 1.5), (3.5, 1.5)
    both = render(hall(8, [near, far]), pose)[0]
    alone = render(hall(8, [near]), pose)[0]
    swapped = hall(8, [far, near])._replace(colours=np.array([[1, 0]], dtype=np.uint8))
    assert (render(swapped, pose)[0] == both).all()
    bare = render(hall(8, []), pose)[0]
    inside = (alone != bare).any(axis=-1)
    inside &= np.roll(inside, 2, 0) & np.roll(inside, -2, 0) & np.roll(inside, 2, 1) & np.roll(inside, -2, 1)
    assert inside.sum() > 100
    assert (both[inside] == alone[inside]).all()
    red = both[inside].astype(int)
    assert (red[:, 0] > red[:, 1]).all()
    far_only = (render(hall(8, [far]), pose)[0] != bare).any(axis=-1)
    assert (far_only & inside).any()


def test_a_dome_ends_where_a_wall_begins():
    """Most of it is inside the wall: only the cap that comes out of it is seen, as the plain renderer says."""
    scene, pose = hall(8, [(3.2, 1.5)], ((3, 0), (3, 1), (3, 2))), (1.2, 1.4, 0.05)
    picture = render(scene, np.array([pose]))[0].astype(float)
    met: list[str] = []
    for row in range(30, 46):
        for column in range(20, 44, 3):
            name, colour = trace(scene, pose, row + 0.5, column + 0.5)
            if within_one_surface(scene, pose, row, column, name):
                assert np.abs(picture[row, column] - colour).max() < 0.51, (row, column, name)
                met.append(str(name[0] if isinstance(name, tuple) else name))
    assert met.count("wall") > 20
    assert met.count("dome") > 1


def test_domes_lie_where_perspective_puts_them():
    """Its foot straight ahead: the contact is RADIUS nearer than the middle, on the floor."""
    scene, away = hall(8, [(4.5, 1.5)]), 3.0
    picture = render(scene, np.array([[4.5 - away - 0.075, 1.5, 0.0]]))[0]
    bare = render(hall(8, []), np.array([[4.5 - away - 0.075, 1.5, 0.0]]))[0]
    rows, columns = np.nonzero((picture != bare).any(axis=-1))
    focal = 32 / math.tan(math.radians(40))
    horizon = 32 - focal * 0.1
    foot = horizon + focal * CAMERA_HEIGHT / (away - RADIUS)
    assert abs(rows.max() + 1 - foot) < 1.5
    assert abs((columns.max() + 1 - columns.min()) - 2 * focal * RADIUS / away) < 2.5
    assert columns.min() + columns.max() == 63  # straight ahead is the middle


def test_same_pose_same_bytes_whatever_is_drawn_beside_it():
    scene = draw_scenes(layout("four"), np.random.default_rng(0), 3)
    rng = np.random.default_rng(1)
    poses = np.column_stack([rng.uniform(0.2, 2.8, (30, 2)), rng.uniform(-3, 3, 30)])
    index = rng.integers(3, size=30)
    together = render(scene, poses, index)
    assert (render(scene, poses, index, threads=3) == together).all()
    for f in range(30):
        assert (render(scene.take(slice(index[f], index[f] + 1)), poses[f : f + 1])[0] == together[f]).all()
    assert len({picture.tobytes() for picture in together}) == 30


def test_what_was_seen_is_noted():
    scene = hall(8, [(5.5, 1.5), (1.5, 0.5)], ((3, 1), (3, 2), (3, 0)))
    seen = nothing_seen(scene)
    render(scene, np.array([[2.5, 1.5, math.pi]]), seen=seen)
    assert seen.domes.tolist() == [[0, 1]]
    assert seen.cells[0, 2, 0] == 1
    assert not seen.cells[0, :, 4:].any()
    render(scene, np.array([[2.5, 1.5, 0.0]]), seen=seen)
    assert seen.cells[0, 2, 4] == 1
    assert not seen.cells[0, :, 5:].any()
    assert seen.domes.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("poses", "index", "message"),
    [
        (np.zeros((2, 2)), None, "poses are"),
        (np.ones((2, 3)), np.zeros(3, dtype=np.int64), "poses are"),
        (np.ones((1, 3)), np.array([1]), "index must lie in 0..0"),
        (np.full((1, 3), -0.1), None, "within the outer walls"),
        (np.full((1, 3), np.nan), None, "within the outer walls"),
    ],
)
def test_bad_calls_end_in_one_line(poses: Any, index: Any, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        render(hall(8, []), poses, index)
    assert "\n" not in str(error.value)


def test_textures_average_from_level_to_level():
    made = textures()
    assert made.patterns.shape == (3, sum((TEXELS >> k) ** 2 for k in range(LEVELS)))
    assert not any(array.flags.writeable for array in made)
    for pattern in made.patterns:
        assert pattern.min() >= 0
        assert pattern.max() <= 1
        assert pattern[-1] == pytest.approx(pattern[: TEXELS**2].mean(), abs=1e-5)
    assert len({tint.tobytes() for tint in made.tints}) == len(made.tints)
    assert (made.tints.sum(axis=1) <= 255).all()
    assert DOME_RGB.max() <= 1


def roll(states: Any, actions: Any, grid: Any) -> None:
    replay(states, np.array(actions, dtype=np.uint8), grid)


def test_steps_and_turns_are_those_that_were_measured():
    """A quarter of a cell and 18.4 degrees; half of a first step, and the rest after letting go."""
    grid = hall(20, []).grid[0]
    states = np.zeros((20, 5))
    states[0, :2] = 1.5, 1.5
    roll(states, [0, *[FORWARD] * 8, *[NOOP] * 11], grid)
    x = np.diff(states[:, 0])
    assert x[7] == pytest.approx(0.25, abs=1e-3)
    assert x[0] == pytest.approx(0.112, abs=0.01)
    assert x[8] == pytest.approx(0.138, abs=0.01)
    assert x.sum() == pytest.approx(2.0, abs=1e-3)
    assert (states[:, 1] == 1.5).all()
    roll(states, [0, *[LEFT] * 5, *[NOOP] * 14], grid)
    assert np.degrees(states[-1, 2]) == pytest.approx(5 * 18.4, abs=0.1)
    assert (states[:, :2] == 1.5).all()
    roll(states, [0, *[RIGHT] * 12, *[NOOP] * 7], grid)
    assert np.degrees(states[-1, 2]) == pytest.approx(360 - 12 * 18.4, abs=0.2)  # within -180..180
    roll(states, [0, *[FORWARD_LEFT] * 19], grid)
    assert states[-1, 3] > 0.9
    assert ACTIONS == WALK_ACTIONS


def test_nothing_gets_into_a_wall():
    rng = np.random.default_rng(0)
    scene = draw_scenes(layout("ten"), rng, 1)
    grid = scene.grid[0]
    walls = np.argwhere(grid >= FIRST_WALL)[:, ::-1] - 1  # lower left corners (x, y)
    states = np.zeros((4000, 5))
    states[0, :2] = 0.5
    actions = rng.choice([FORWARD, FORWARD, FORWARD, LEFT, RIGHT, FORWARD_LEFT], size=4000).repeat(4)[:4000]
    roll(states, actions, grid)
    offset = states[:, None, :2] - np.clip(states[:, None, :2], walls, walls + 1)
    assert np.linalg.norm(offset, axis=-1).min() > BALL - 1e-6
    assert len(np.unique(np.floor(states[:, :2]), axis=0)) > 20


def test_it_slides_along_a_wall_and_stops_in_front_of_one():
    grid = hall(20, []).grid[0]
    states = np.zeros((14, 5))
    states[0, :3] = 1.5, 0.5, -math.pi / 2
    roll(states, [0, *[FORWARD] * 12, NOOP], grid)
    assert states[-2:, 1] == pytest.approx(BALL)
    assert states[-2:, 0] == pytest.approx(1.5)
    assert states[-2, 3] == pytest.approx(0.0, abs=0.3)
    slid: list[float] = []
    for angle in (60, 45, 15):
        states = np.zeros((9, 5))
        states[0, :3] = 1.5, BALL, -math.radians(angle)
        roll(states, [FORWARD] * 9, grid)
        assert states[:, 1] == pytest.approx(BALL)
        slid.append(states[-1, 0] - 1.5)
    assert 0.1 < slid[0] < slid[1] < slid[2] < 2.0


def test_vectors_to_targets_are_to_the_right_and_ahead():
    points = np.array([[[2.0, 1.0], [1.0, 0.0]]], dtype=np.float32)
    vectors = seen_from(points, np.array([[1.0, 1.0]]), np.array([0.0]))
    assert vectors == pytest.approx(np.array([[[0.0, 1.0], [1.0, 0.0]]]), abs=1e-6)
    turned = seen_from(points, np.array([[1.0, 1.0]]), np.array([math.pi / 2]))
    assert turned == pytest.approx(np.array([[[1.0, 0.0], [0.0, -1.0]]]), abs=1e-6)
    assert free_cells(hall(4, [], ((0, 1),)).grid)[0].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]


def test_numba_is_imported_only_when_something_is_drawn():
    script = "import sys, recollect.envs; recollect.envs.find('maze-9x9').build(); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
