"""The real Memory Maze: what can be said without MuJoCo, and (``-m mujoco``) the thing itself."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from recollect.cli import main
from recollect.core.config import from_dict, to_dict
from recollect.core.errors import ConfigError
from recollect.envs import ENVS, register
from recollect.envs.memory_maze import PROBES, SIZES, MemoryMaze, _gymnasium_as_gym, package, quick, touched, towards

Config = MemoryMaze.Config


def test_configs_need_no_mujoco() -> None:
    for size, (n_targets, limit) in SIZES.items():
        config = ENVS[f"memory-maze-{size}x{size}"]
        assert config == Config(size)
        assert isinstance(config, Config)
        assert (config.n_targets, config.n_actions, config.episode_length) == (n_targets, 6, 1001)
        assert from_dict(Config, to_dict(config)) == config
        assert Config(size, steps=limit).episode_length == limit + 1
        with pytest.raises(ConfigError, match=rf"steps must lie in 1\.\.{limit}, got {limit + 1}"):
            Config(size, steps=limit + 1)
    assert (Config(steps=7).context_length, Config(steps=7).query_length) == (4, 4)
    with pytest.raises(ConfigError, match="size is 9, 11, 13, 15, got 10"):
        Config(10)


def test_without_mujoco_one_line_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    package.cache_clear()
    for name in list(sys.modules):
        if name.split(".")[0] in ("memory_maze", "dm_control"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "memory_maze", None)
    expected = (
        r"memory-maze needs MuJoCo and its package \(memory_maze.* is missing\): pip install 'recollect\[mujoco\]'"
    )
    with pytest.raises(ConfigError, match=expected):
        Config().build()
    words = ["data", "make", "memory-maze-9x9", "--episodes", "2", "--workers", "0", "--out", str(tmp_path / "store")]
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert "gym" not in sys.modules
    package.cache_clear()


def test_gymnasium_stands_in_for_gym_only_while_importing() -> None:
    before = dict(gymnasium.registry)
    mine = SimpleNamespace()
    sys.modules["gym"] = mine  # pyright: ignore[reportArgumentType]
    try:
        with _gymnasium_as_gym():
            import gym  # pyright: ignore[reportMissingImports]
            from gym.envs.registration import register  # pyright: ignore[reportMissingImports]

            assert gym.Env is gymnasium.Env
            register(id="MemoryMaze-9x9-v0", entry_point=dict)
        assert sys.modules["gym"] is mine
    finally:
        del sys.modules["gym"]
    assert "gym.spaces" not in sys.modules
    assert dict(gymnasium.registry) == before


class Sphere:
    """As much of a target sphere as its activation needs, with the loop that is replaced."""

    def __init__(self, geom: int, only: list[int] | None) -> None:
        self._activated, self._geom_id, self._specific_collision_geom_ids = False, geom, only
        self._material = "paint"

    def _update_activation(self, physics: Any) -> None:
        if not self._activated:
            for one, two in zip(physics.data.contact.geom1, physics.data.contact.geom2, strict=True):
                only = self._specific_collision_geom_ids
                if (not only or one in only or two in only) and self._geom_id in (one, two):
                    self._activated = True
                    physics.bind(self._material).rgba[-1] = 0


def test_the_quick_contact_check_finds_what_the_loop_finds() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for trial in range(300):
        n = int(rng.integers(0, 6))
        contact = SimpleNamespace(geom1=rng.integers(0, 8, n), geom2=rng.integers(0, 8, n))
        only = rng.integers(0, 8, 2).tolist() if trial % 2 else None
        results = []
        for kind in (Sphere, quick(Sphere)):
            sphere, paint = kind(3, only), SimpleNamespace(rgba=np.ones(4))
            physics = SimpleNamespace(data=SimpleNamespace(contact=contact), bind=lambda _, paint=paint: paint)
            sphere._update_activation(physics)
            results.append((bool(sphere._activated), paint.rgba.tolist()))
        assert results[0] == results[1]
        assert results[0][0] == touched(contact, 3, only)
        found += results[0][0]
    assert 30 < found < 270


def test_the_walk_takes_shortest_paths() -> None:
    free = np.array([[1, 1, 1], [0, 0, 1], [1, 1, 1]], dtype=np.uint8)
    at, path = (0, 0), [(0, 0)]
    while at != (0, 2):
        step = towards(free, at, (0, 2))
        assert step is not None
        at = step
        path.append(at)
    assert path == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2)]
    assert towards(np.eye(2, dtype=np.uint8), (0, 0), (1, 1)) is None


@pytest.fixture
def real() -> None:
    pytest.importorskip("dm_control")
    package.cache_clear()


@pytest.mark.mujoco
@pytest.mark.usefixtures("real")
@pytest.mark.filterwarnings("default")
class TestTheRealThing:
    def test_gymnasium_accepts_it(self) -> None:
        register()
        check_env(gymnasium.make("recollect/memory-maze-9x9-v0").unwrapped)

    def test_the_script_is_what_is_generated_and_frames_differ(self) -> None:
        config = Config(steps=40)
        frames = config.generate(np.random.default_rng(0), 2)
        again = config.generate(np.random.default_rng(0), 1)
        assert all((frames[key][0] == again[key][0]).all() for key in frames)
        assert frames["image"].shape == (2, 41, 64, 64, 3)
        assert len({image.tobytes() for image in frames["image"].reshape(-1, 64 * 64 * 3)}) > 70
        assert (frames["maze_layout"][0] != frames["maze_layout"][1]).any()
        assert set(PROBES) < set(frames)
        env = config.build()
        image, _ = env.reset(seed=int(np.random.default_rng(0).integers(2**31)))
        assert (image == frames["image"][0, 0]).all()
        actions = env.scripted_actions()
        assert actions.tolist() == frames["action"][0, 1:].tolist()
        for t, action in enumerate(actions.tolist(), 1):
            image, reward, *_ = env.step(action)
            assert (image == frames["image"][0, t]).all()
            assert reward == frames["reward"][0, t]
            assert np.array_equal(env.hidden_state()["agent_pos"], frames["agent_pos"][0, t])
        env.close()

    def test_touching_a_target_gives_the_same_as_the_loop(self) -> None:
        """Walk straight to the target, with the package's own spheres and with the quick ones: same frames, rewards."""
        from dm_control.locomotion.props import target_sphere  # pyright: ignore[reportMissingImports]

        tasks = package()
        maze = sys.modules["memory_maze.maze"]
        quick_spheres = maze.target_sphere  # pyright: ignore[reportAttributeAccessIssue]
        runs: list[list[Any]] = []
        for spheres in (quick_spheres, target_sphere):
            maze.target_sphere = spheres  # pyright: ignore[reportAttributeAccessIssue]
            game = tasks.memory_maze_9x9(seed=5, global_observables=True)
            step, run = game.reset(), []
            for _ in range(150):
                seen = step.observation
                at, free = seen["agent_pos"], seen["maze_layout"]
                goal = tuple(int(v) for v in seen["target_pos"])
                cell = tuple(int(v) for v in at)
                near = towards(free, cell, goal)
                want = (np.array(near) + 0.5 if near and cell != goal else seen["target_pos"]) - at
                ahead, aside = want @ seen["agent_dir"], seen["agent_dir"][0] * want[1] - seen["agent_dir"][1] * want[0]
                angle = np.arctan2(aside, ahead)
                step = game.step(1 if abs(angle) < 0.3 else 2 if angle > 0 else 3)
                run.append((step.reward, step.observation["image"].tobytes(), tuple(step.observation["agent_pos"])))
            game.close()
            runs.append(run)
        maze.target_sphere = quick_spheres  # pyright: ignore[reportAttributeAccessIssue]
        assert sum(reward for reward, *_ in runs[0]) >= 1, "no target was touched"
        assert runs[0] == runs[1]
