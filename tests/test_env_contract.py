"""What every environment owes, asked of every line of ``ENVS``: a new one needs no test of its own for this."""

from __future__ import annotations

from functools import cache

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from recollect.core.config import from_dict, to_dict
from recollect.envs import ENVS, EnvConfig, Frames, register
from recollect.envs.memory_maze import MemoryMaze

OURS = [name for name, config in ENVS.items() if not isinstance(config, MemoryMaze.Config)]
"""All but the one that needs MuJoCo, which ``test_memory_maze.py`` plays."""
LENGTHS = {
    "distracting-memory-100": (199, 51),
    "distracting-memory-200": (399, 101),
    "distracting-memory-400": (799, 201),
    "multi-doors-keys-3": (76, 174),
    "multi-doors-keys-5": (170, 380),
    "multi-doors-keys-7": (296, 654),
    "two-rooms": (301, 200),
    "four-rooms": (501, 500),
    "ten-rooms": (1101, 900),
    "two-rooms-teleport": (151, 100),
    "four-rooms-teleport": (301, 200),
    "ten-rooms-teleport": (601, 400),
    "maze-9x9": (501, 500),
    "maze-15x15": (501, 500),
}
"""Context and query, as published; of the 1,001 frames of Memory Maze's offline episodes the second half is asked."""


@cache
def episodes(name: str) -> Frames:
    return ENVS[name].generate(np.random.default_rng(7), 1)


def test_every_environment_has_its_published_lengths() -> None:
    assert {name: (c.context_length, c.query_length) for name, c in ENVS.items() if name in OURS} == LENGTHS


@pytest.mark.parametrize("name", OURS)
def test_scripted_episodes_hold_what_the_contract_says(name: str) -> None:
    config, frames = ENVS[name], episodes(name)
    T = config.episode_length
    assert all(array.shape[:2] == (1, T) for array in frames.values())
    seen = frames[config.observation]
    assert (seen.dtype, seen.shape[2:]) == (np.uint8, config.observation_shape)
    if config.observation == "tiles":
        assert seen.max() < config.n_codes
    assert frames["action"].dtype == np.uint8
    assert 1 < len(np.unique(frames["action"][:, 1:])) <= config.n_actions
    assert frames["action"].max() < config.n_actions
    assert frames["reward"].dtype == np.float32
    steps = np.arange(T)
    assert np.array_equal(frames["is_first"][0], steps == 0)
    assert np.array_equal(frames["is_last"][0], steps == T - 1)
    assert not (frames["is_terminal"] & ~frames["is_last"]).any()
    assert config.observation in frames
    assert set(config.constant) <= set(frames)
    for key in config.constant:
        assert (frames[key] == frames[key][:, :1]).all(), key


@pytest.mark.parametrize("name", OURS)
def test_what_does_not_change_is_declared(name: str) -> None:
    """A key that never changes, in several episodes, wastes a store's room: it belongs to ``constant``."""
    config = ENVS[name]
    marks = {"reward", "is_first", "is_last", "is_terminal"}
    still = {key for key, array in episodes(name).items() if (array == array[:, :1]).all()} - marks
    assert still <= {*config.constant, "target_pos", "target_color"}


@pytest.mark.parametrize("name", OURS)
def test_a_perfect_memory_is_always_right(name: str) -> None:
    scores = ENVS[name].oracle(episodes(name))
    assert scores
    # Of a million pixels one may look known that is not: what is unknown is drawn twice, and may agree by chance.
    right = {key: value for key, value in scores.items() if key != "seen"}
    assert right == pytest.approx(dict.fromkeys(right, 1.0), abs=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_gymnasium_accepts_it_and_the_same_seed_is_the_same_episode(name: str) -> None:
    register()
    env = gymnasium.make(f"recollect/{name}-v0", max_episode_steps=None).unwrapped
    check_env(env, skip_render_check=True)
    first, _ = env.reset(seed=3)
    played = [env.step(action)[0] for action in env.scripted_actions()[:40]]  # pyright: ignore[reportAttributeAccessIssue]
    again, _ = env.reset(seed=3)
    assert np.array_equal(first, again)
    assert all(
        np.array_equal(seen, env.step(action)[0])
        for seen, action in zip(played, env.scripted_actions()[:40], strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    )
    other, _ = env.reset(seed=4)
    assert env.hidden_state().keys() & episodes(name).keys()  # pyright: ignore[reportAttributeAccessIssue]
    assert any(
        not np.array_equal(a, env.step(action)[0])
        for a, action in zip(played, env.scripted_actions()[:40], strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    ) or not np.array_equal(first, other)


@pytest.mark.parametrize("name", ENVS)
def test_configs_survive_the_journey_through_json(name: str) -> None:
    assert from_dict(EnvConfig, to_dict(ENVS[name])) == ENVS[name]
