"""The mazes: plans, targets, the meaning of the keys, the scripted walk, stepping against generating."""

from __future__ import annotations

import hashlib
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from recollect.core.config import from_dict, to_dict
from recollect.core.errors import ConfigError
from recollect.envs import ENVS, EnvConfig, Maze, find, register
from recollect.envs.maze.env import Episodes, draw, play, script
from recollect.envs.maze.plans import draw_plan
from recollect.envs.maze.policy import TOUCH
from recollect.envs.rooms.scene import BRIGHT_FLOOR, DOME_RGB, FIRST_WALL

Config = Maze.Config
SIZES = (9, 11, 13, 15)


@pytest.fixture(scope="module")
def frames() -> dict[str, Any]:
    return Config(9).generate(np.random.default_rng(0), 2)


def reached_from(free: np.ndarray[Any, Any], y: int, x: int) -> np.ndarray[Any, Any]:
    seen = np.zeros_like(free)
    waiting = [(y, x)]
    while waiting:
        y, x = waiting.pop()
        if free[y, x] and not seen[y, x]:
            seen[y, x] = True
            waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return seen


@pytest.mark.parametrize("size", SIZES)
def test_mazes_are_connected_rooms_and_corridors(size: int):
    config, rng = Config(size), np.random.default_rng(size)
    seen: set[bytes] = set()
    loops = 0
    for _ in range(25):
        plan = draw_plan(rng, size, config.rules, config.n_targets)
        free = plan.cells < FIRST_WALL
        seen.add(free.tobytes())
        y, x = np.argwhere(free)[0]
        assert (reached_from(free, int(y), int(x)) == free).all()
        assert not free[0].any() and not free[-1].any() and not free[:, 0].any() and not free[:, -1].any()  # noqa: PT018
        assert config.n_targets <= len(plan.rooms) <= config.rules.most
        in_rooms = np.zeros_like(free)
        for row, column, height, width in plan.rooms:
            assert height in config.rules.sides
            assert width in config.rules.sides
            in_rooms[row : row + height, column : column + width] = True
        assert (in_rooms == (plan.cells == BRIGHT_FLOOR)).all()
        ways = free[2:, 1:-1].astype(int) + free[:-2, 1:-1] + free[1:-1, 2:] + free[1:-1, :-2]
        assert ways[free[1:-1, 1:-1]].min() >= 2  # no blind ends
        corridor = free & ~in_rooms
        joins = (corridor[1:] & corridor[:-1]).sum() + (corridor[:, 1:] & corridor[:, :-1]).sum()
        loops += int(joins > 0)
    assert len(seen) == 25
    assert loops > 0


@pytest.mark.parametrize("size", SIZES)
def test_targets_lie_in_rooms_of_their_own(size: int):
    config = Config(size)
    assert config.n_targets == {9: 3, 11: 4, 13: 5, 15: 6}[size]
    episodes = draw(config, np.random.default_rng(1), 20)
    scene = episodes.scene
    for i in range(20):
        x, y = np.floor(scene.domes[i]).astype(int).T + 1
        assert (scene.grid[i, y, x] == BRIGHT_FLOOR).all()
        room = np.zeros(len(x), dtype=int)
        bright = scene.grid[i] == BRIGHT_FLOOR
        for k in range(len(x)):
            room[k] = int(np.flatnonzero(reached_from(bright, y[k], x[k]))[0])
        assert len(set(room.tolist())) == len(x)
        start = episodes.start[i, :2]
        assert scene.grid[i, int(start[1]) + 1, int(start[0]) + 1] == BRIGHT_FLOOR
        assert np.linalg.norm(scene.domes[i] - start, axis=1).min() > TOUCH
    assert len(np.unique(scene.grid[scene.grid >= FIRST_WALL])) == 8
    assert scene.colours[0].tolist() == list(range(config.n_targets))


def test_keys_mean_what_memory_maze_means_by_them(frames: dict[str, Any]):
    n, T = 2, 1001
    shapes = {
        "image": ((64, 64, 3), np.uint8),
        "action": ((), np.uint8),
        "reward": ((), np.float32),
        "maze_layout": ((9, 9), np.uint8),
        "agent_pos": ((2,), np.float32),
        "agent_dir": ((2,), np.float32),
        "targets_pos": ((3, 2), np.float32),
        "targets_vec": ((3, 2), np.float32),
        "target_pos": ((2,), np.float32),
        "target_vec": ((2,), np.float32),
        "target_color": ((3,), np.float32),
    }
    for key, (shape, dtype) in shapes.items():
        assert frames[key].shape == (n, T, *shape), key
        assert frames[key].dtype == dtype, key
    assert np.abs(np.linalg.norm(frames["agent_dir"], axis=-1) - 1).max() < 1e-6
    # Ahead is agent_dir; to the right is that turned clockwise.
    ahead = frames["agent_dir"][:, :, None]
    right = np.stack([ahead[..., 1], -ahead[..., 0]], axis=-1)
    vec = frames["targets_vec"]
    rebuilt = frames["agent_pos"][:, :, None] + vec[..., :1] * right + vec[..., 1:] * ahead
    assert np.abs(rebuilt - frames["targets_pos"]).max() < 1e-5
    # The agent walks where the layout, lowest row first, says it is free.
    x, y = np.floor(frames["agent_pos"]).astype(int).transpose(2, 0, 1)
    assert (frames["maze_layout"][np.arange(n)[:, None], np.arange(T), y, x] == 1).all()
    assert (frames["maze_layout"] == (frames["cells"][..., 1:-1, 1:-1] < FIRST_WALL)).all()
    moved = np.diff(frames["agent_pos"], axis=1)
    forward = (moved * frames["agent_dir"][:, 1:]).sum(axis=-1)
    assert forward.min() > -0.05
    assert (frames["is_first"].sum(), frames["is_last"].sum(), frames["is_terminal"].sum()) == (n, n, 0)
    assert Config(9).context_length + Config(9).query_length == 1001


def test_a_touched_target_is_rewarded_and_changes():
    config = Config(9)
    episodes = draw(config, np.random.default_rng(2), 64)
    states, actions, targets, rewards = script(config, episodes)
    position = states[..., None, :2] - episodes.scene.domes[:, None]
    away = np.linalg.norm(position, axis=-1)
    rows, steps = np.arange(64)[:, None], np.arange(1001)
    before = np.concatenate([targets[:, :1], targets[:, :-1]], axis=1)
    touched = away[rows, steps, before] <= TOUCH
    touched[:, 0] = False
    assert (touched == (rewards == 1)).all()
    assert ((targets != before) == touched).all()
    assert (rewards[:, 0] == 0).all()
    assert 1 < rewards.sum(axis=1).mean() < 4  # published: 1 to 2
    assert set(np.unique(targets)) == {0, 1, 2}
    following = [(int(b), int(a)) for b, a in zip(before[touched], targets[touched], strict=True)]
    assert len(set(following)) == 6
    assert set(np.unique(actions)) == set(range(6))


@pytest.mark.parametrize("size", SIZES)
def test_the_walk_sees_much_of_the_maze(size: int):
    episodes = draw(Config(size), np.random.default_rng(3), 8)
    states = script(Config(size), episodes).states
    share = [
        len(np.unique(np.floor(walk[:, :2]), axis=0)) / (grid < FIRST_WALL).sum()
        for walk, grid in zip(states, episodes.scene.grid, strict=True)
    ]
    assert np.mean(share) > {9: 0.7, 11: 0.6, 13: 0.5, 15: 0.4}[size]
    noisy = script(Config(size, noise=1.0), episodes).actions[:, 1:]
    assert np.abs(np.bincount(noisy.ravel(), minlength=6) / noisy.size - 1 / 6).max() < 0.02


@pytest.mark.parametrize("border", [False, True])
def test_generating_equals_stepping(border: bool):
    config = Config(9, border=border)
    for seed in range(40):  # an episode with a reward
        episodes = draw(config, np.random.default_rng(seed), 1)
        if script(config, episodes).rewards.any():
            break
    frames = play(config, episodes)
    env = Maze(config)
    observation, _ = env.reset(options={"episodes": episodes})
    reward, truncated = 0.0, False
    actions = env.scripted_actions().tolist()
    for t in range(1001):
        if t:
            observation, reward, terminated, truncated, _ = env.step(actions[t - 1])
            assert not terminated
        assert (frames["image"][0, t] == observation).all()
        assert frames["reward"][0, t] == reward
        assert frames["is_last"][0, t] == truncated
        if t % 25 == 0 or reward:
            for key, value in env.hidden_state().items():
                assert np.array_equal(frames[key][0, t], value), (key, t)
    assert (frames["action"][0, 1:] == actions).all()
    edge, inner = frames["image"][0, :, 0, 5], frames["image"][0, :, 2, 5]
    expected = (frames["target_color"][0] * 255 * 0.7).astype(np.uint8)
    assert (edge == expected).all() == border
    assert not (inner == expected).all()


def test_a_seeded_reset_is_the_first_generated_episode(frames: dict[str, Any]):
    observation, _ = Maze(Config(9)).reset(seed=0)
    assert (observation == Config(9).generate(np.random.default_rng(0), 1)["image"][0, 0]).all()


def test_a_perfect_memory_foretells_what_it_has_seen(frames: dict[str, Any]):
    scores = Config(9).oracle(frames)
    assert scores["view"] > 0.9999
    assert scores["seen"] > 0.9
    large = Config(15, border=True)
    scores = large.oracle(large.generate(np.random.default_rng(1), 1))
    assert scores["view"] > 0.9999
    assert 0.3 < scores["seen"] < 1


def test_pinned_and_independent_of_the_split_of_work():
    config = Config(15)
    episodes = draw(config, np.random.default_rng(4), 4)
    together, threaded = script(config, episodes), script(config, episodes, threads=2)
    for a, b in zip(together, threaded, strict=True):
        assert a.tobytes() == b.tobytes()
    for i in range(4):
        rows = slice(i, i + 1)
        alone = Episodes(episodes.scene.take(rows), episodes.start[rows], episodes.target[rows], episodes.streams[rows])
        for a, b in zip(together, script(config, alone), strict=True):
            assert a[i].tobytes() == b[0].tobytes()
    parts = (episodes.scene.grid, together.actions, together.targets, np.round(together.states, 4) + 0.0)
    # Another digest means that every published number was measured on other data: say so in the changelog.
    assert hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16] == "47e7fd756e7ce627"


def test_gymnasium_accepts_it_without_a_warning():
    register()
    made = gymnasium.make("recollect/maze-9x9-v0", disable_env_checker=True)
    assert made.unwrapped.config == ENVS["maze-9x9"]  # pyright: ignore[reportAttributeAccessIssue]
    check_env(made.unwrapped)


def test_misuse():
    for values, message in (
        ({"size": 10}, "size must be one of 9, 11, 13, 15, got 10"),
        ({"noise": 1.5}, "noise must lie in 0..1"),
        ({"noise": float("nan")}, "noise must lie in 0..1"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            Config(**values)
        assert "\n" not in str(error.value)
    env = Maze(Config(9))
    for call in (lambda: env.step(0), env.hidden_state, env.scripted_actions):
        with pytest.raises(gymnasium.error.ResetNeeded):
            call()
    assert find("maze-15x15") == Config(15)
    assert from_dict(EnvConfig, to_dict(Config(11, border=True))) == Config(11, border=True)
    assert DOME_RGB.shape == (6, 3)
