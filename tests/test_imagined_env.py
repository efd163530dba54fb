"""Imagination as a vector environment: the model's own dreams, contexts of all kinds, autoreset, seeds, misuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DtypeObservation, RecordEpisodeStatistics

from recollect.core.errors import ConfigError, RecollectError
from recollect.core.state import index_batch
from recollect.data import EpisodeStore, collect
from recollect.envs import DistractingMemory
from recollect.envs.tiles import render
from recollect.eval.contexts import StoredContexts
from recollect.eval.imagined_env import ImaginedEnv
from recollect.eval.pictures import render_on
from recollect.models.dense import init_weights
from recollect.models.vision import Pixels, Tiles, VisionConfig
from recollect.models.world_model import Batch, WorldModel
from recollect.recipes import load_recipe
from recollect.train.loop import train
from recollect.train.world import imagined_env
from small_worlds import DYNAMICS

WORLD = DistractingMemory.Config(width=11)
HORIZON = 4


def world_model(kind: str = "gru", vision: VisionConfig | None = None) -> WorldModel:
    torch.manual_seed(0)
    vision = vision or Tiles(n_codes=WORLD.n_codes, hidden=16)
    model = WorldModel(WorldModel.Config(3, DYNAMICS[kind], vision, hidden=16)).double().eval()
    for head in (model.reward_head, model.continue_head):
        init_weights(head[-1])  # else both say 1/2 of everything
    return model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return collect(WORLD, 6, 0, tmp_path_factory.mktemp("imagined") / "store")


def dreaming(store: Any, model: WorldModel | None = None, n: int = 3, **changes: Any) -> ImaginedEnv:
    given: dict[str, Any] = {"context": WORLD.context_length, "horizon": HORIZON, "terminate_below": None, **changes}
    return ImaginedEnv(world_model() if model is None else model, store, num_envs=n, **given)


def frames(store: EpisodeStore, episode: int, start: int, length: int) -> Batch:
    """One window (1, length, ...), by hand."""
    found, cut = store.episode(episode), slice(start, start + length)
    action = np.eye(3)[found["action"][cut]] * ~found["is_first"][cut, None]
    fields = (found["tiles"], action, found["reward"].astype(np.float64), found["is_first"], found["is_terminal"])
    return Batch(*(torch.from_numpy(np.array(f if f is action else f[cut]))[None] for f in fields))


def stacked(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat(fields) for fields in zip(*(part.tensors for part in parts), strict=True)))


def played(env: ImaginedEnv, steps: int, **reset: Any) -> tuple[Any, list[Any]]:
    """The first observation, and all steps under the same random actions every time."""
    actions = np.random.default_rng(1).integers(3, size=(steps, env.num_envs))
    first, _ = env.reset(**reset)
    return first, [env.step(row) for row in actions]


@pytest.mark.parametrize("kind", ["s5", "attention", "rssm"])
@pytest.mark.parametrize("pixels", [False, True])
def test_steps_are_the_models_own_imagination(store: EpisodeStore, kind: str, pixels: bool) -> None:
    model = world_model(kind, Pixels(size=40, depth=2) if pixels else None)

    def drawn(batch: Batch) -> Batch:
        return batch._replace(observation=render_on(batch.observation))

    source: Any = StoredContexts(store, drawn) if pixels else store
    episodes, actions = [4, 0, 2], np.random.default_rng(0).integers(3, size=(3, 6))
    env = dreaming(source, model, horizon=6, context=9)
    first, info = env.reset(seed=5, options={"episodes": episodes})
    assert info == {}
    steps = [env.step(actions[:, t]) for t in range(6)]

    generator = torch.Generator().manual_seed(5)
    batch = stacked([frames(store, episode, 0, 9) for episode in episodes])
    with torch.no_grad():
        state = model.observe(drawn(batch) if pixels else batch, generator=generator).state
        ahead = model.imagine(state, torch.eye(3).double()[torch.from_numpy(actions)], generator=generator)
    truth = np.stack([store.episode(episode)["tiles"][8] for episode in episodes])
    assert (first == (render(truth) if pixels else truth)).all()
    assert torch.equal(env.state.h, ahead.state.h)
    assert torch.equal(env.state.z, ahead.state.z)
    for t, (seen, reward, terminated, truncated, _) in enumerate(steps):
        assert (seen == ahead.observation[:, t].numpy()).all()
        np.testing.assert_allclose(reward, ahead.reward[:, t].numpy(), rtol=1e-6)
        assert not terminated.any()
        assert truncated.all() == truncated.any() == (t == 5)


@pytest.mark.parametrize("kind", DYNAMICS)
def test_contexts_of_any_length_from_any_step_are_observed_together(store: EpisodeStore, kind: str) -> None:
    model = world_model(kind)
    spans = np.array([(0, 0, 21), (1, 0, 5), (0, 4, 9), (2, 3, 21), (5, 26, 1)])
    env = dreaming(store, model, 5, sample=False)
    first, _ = env.reset(options=dict(zip(("episodes", "start", "context"), spans.T, strict=True)))
    assert (env.spans == spans).all()
    actions = np.array([0, 1, 2, 2, 1])
    state = env.state
    seen = env.step(actions)[0]
    for i, (episode, start, length) in enumerate(spans.tolist()):
        with torch.no_grad():
            alone = model.observe(frames(store, episode, start, length)).state
            ahead = model.imagine(alone, torch.eye(3).double()[actions[i]].view(1, 1, 3))
        torch.testing.assert_close(state.h[i], alone.h[0], rtol=0, atol=1e-10)
        assert torch.equal(state.z[i], alone.z[0])
        assert (first[i] == store.episode(episode)["tiles"][start + length - 1]).all()
        torch.testing.assert_close(env.state.h[i], ahead.h[0, 0], rtol=0, atol=1e-10)
        assert (seen[i] == ahead.observation[0, 0].numpy()).all()


def test_a_dream_ends_at_the_horizon_and_another_begins_at_the_next_step(store: EpisodeStore) -> None:
    assert ImaginedEnv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    env = dreaming(store, n=4)
    env.reset(seed=0)
    drawn = [env.spans]
    actions = np.zeros(4, dtype=np.int64)
    for t in range(1, 3 * (HORIZON + 1)):
        seen, reward, terminated, truncated, _ = env.step(actions)
        assert not terminated.any()
        assert truncated.all() == truncated.any() == (t % (HORIZON + 1) == HORIZON)
        if t % (HORIZON + 1) == 0:
            drawn.append(env.spans)
            truth = np.stack([store.episode(e)["tiles"][WORLD.context_length - 1] for e in env.spans[:, 0]])
            assert (seen == truth).all()
            assert (reward == 0).all()
        else:
            assert (reward > 0).all()
    assert len(drawn) == 3
    assert len({tuple(spans[:, 0]) for spans in drawn}) == 3
    assert all((spans[:, 1:] == (0, WORLD.context_length)).all() for spans in drawn)

    first, steps = played(env, HORIZON + 1, options={"episodes": [3, 3, 1, 0], "context": 6})
    assert (steps[-1][0] == first).all()
    assert (env.spans == [(3, 0, 6), (3, 0, 6), (1, 0, 6), (0, 0, 6)]).all()


@pytest.mark.parametrize("kind", ["gru", "attention", "s4", "rssm"])
@pytest.mark.parametrize("chosen", [True, False])
def test_dreams_end_one_by_one(store: EpisodeStore, kind: str, chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model believes in no future. What begins again leaves the other dreams alone, and forgets its own."""
    model, actions = world_model(kind), np.array([[0, 1, 2], [2, 1, 0], [1, 1, 1], [2, 0, 2], [1, 2, 0]])
    env = dreaming(store, model, sample=False, terminate_below=0.25, horizon=9, episodes=(4,))
    options = {"episodes": [0, 1, 2]}
    future = [0.9, 0.2, 0.9]
    monkeypatch.setattr(model, "goes_on", lambda *_: torch.tensor(future))
    env.reset(options=options)
    env._drawing = not chosen
    _, _, terminated, truncated, _ = env.step(actions[0])
    assert terminated.tolist() == [False, True, False]
    assert not truncated.any()
    future[1] = 0.3
    seen, reward, terminated, _, _ = env.step(actions[1])
    assert not terminated.any()
    assert reward[1] == 0
    assert (reward[[0, 2]] > 0).all()
    again = 1 if chosen else 4
    assert env.spans[:, 0].tolist() == [0, again, 2]
    assert (seen[1] == store.episode(again)["tiles"][WORLD.context_length - 1]).all()
    for row in actions[2:]:
        env.step(row)
    one_hot = torch.eye(3).double()[torch.from_numpy(actions)]
    for i, (episode, since) in enumerate(((0, 0), (again, 2), (2, 0))):
        with torch.no_grad():
            alone = model.observe(frames(store, episode, 0, WORLD.context_length)).state
            for t in range(since, 5):
                alone = model.imagine_step(alone, one_hot[None, t, i])
        torch.testing.assert_close(env.state.h[i], alone.h[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(env.state.z[i], alone.z[0])
    # The dream that began later ends later.
    assert env._steps.tolist() == [5, 3, 5]


def test_the_same_seed_is_the_same_dream(store: EpisodeStore) -> None:
    env = dreaming(store, n=8)

    def dream(seed: int | None) -> list[Any]:
        first, steps = played(env, HORIZON + 3, seed=seed)
        return [env.spans, first, *(array for step in steps for array in step[:4]), env.state.z.numpy()]

    one, two, other, onward = dream(3), dream(3), dream(4), dream(None)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    for different in (other, onward):
        assert not np.array_equal(one[0], different[0])
        assert not np.array_equal(one[-1], different[-1])
    unseeded = [dreaming(store, n=8) for _ in range(2)]
    for each in unseeded:
        each.reset(options={"episodes": np.arange(8) % 6})
    assert not torch.equal(unseeded[0].state.z, unseeded[1].state.z)


def test_many_samples_of_one_context_share_its_state(store: EpisodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model = world_model("s5")
    observed: list[tuple[int, ...]] = []
    observe = model.observe

    def counting(batch: Batch, *args: Any, **kwargs: Any) -> Any:
        observed.append(tuple(batch.is_first.shape))
        return observe(batch, *args, **kwargs)

    monkeypatch.setattr(model, "observe", counting)
    actions = np.ones(5, dtype=np.int64)
    env = dreaming(store, model, 5)
    env.reset(seed=0, options={"episodes": [2, 2, 0, 2, 2]})
    assert observed == [(2, WORLD.context_length)]
    assert all(torch.equal(env.state.z[0], env.state.z[i]) for i in (1, 3, 4))
    assert not torch.equal(env.state.z[0], env.state.z[2])
    env.step(actions)
    # h follows from the context and the action alone; rows differ by rounding.
    torch.testing.assert_close(env.state.h[0], env.state.h[4], rtol=0, atol=1e-12)
    assert (env.state.h[0] - env.state.h[2]).abs().max() > 1e-3
    assert len({env.state.z[i].numpy().tobytes() for i in range(5)}) == 5
    modes = dreaming(store, model, 5, sample=False)
    modes.reset(options={"episodes": 2})
    modes.step(actions)
    assert len({modes.state.z[i].numpy().tobytes() for i in range(5)}) == 1


def test_a_random_policy_runs_through_gymnasiums_wrappers(store: EpisodeStore) -> None:
    inner = dreaming(store, n=4, terminate_below=0.5, render_mode="rgb_array")
    real = WORLD.build()
    assert inner.single_observation_space == real.observation_space
    assert inner.single_action_space == real.action_space
    assert dreaming(store, world_model(vision=Pixels(40, 2))).single_observation_space == (
        WORLD.build(pixels=True).observation_space
    )
    env = RecordEpisodeStatistics(DtypeObservation(inner, np.int32))
    env.action_space.seed(0)
    seen, _ = env.reset(seed=0)
    assert seen.dtype == np.int32
    returns = np.zeros(4)
    ended = 0
    for _ in range(4 * (HORIZON + 1)):
        seen, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert seen.shape == (4, 5, 5)
        assert inner._seen in inner.observation_space
        assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float64, np.bool_, np.bool_)
        returns += reward
        over = terminated | truncated
        if over.any():
            np.testing.assert_allclose(info["episode"]["r"][over], returns[over])
            assert (info["episode"]["l"][over] <= HORIZON).all()
            returns[over], ended = 0, ended + over.sum()
    assert ended == env.episode_count > 4
    pictures = env.render()
    assert pictures is not None
    assert len(pictures) == 4
    assert (np.stack(pictures) == render(inner._seen)).all()
    assert dreaming(store).metadata["render_modes"] == ["rgb_array"]


def test_rewards_are_chances_or_told_from_them(store: EpisodeStore) -> None:
    options = {"episodes": [0, 1, 2]}
    chances = np.stack([step[1] for step in played(dreaming(store), HORIZON, seed=2, options=options)[1]])
    assert ((chances > 0) & (chances < 1)).all()
    middle = float(np.median(chances))
    env = dreaming(store, reward_above=middle)
    told = np.stack([step[1] for step in played(env, HORIZON, seed=2, options=options)[1]])
    assert (told == (chances > middle)).all()
    assert 0 < told.sum() < told.size


def test_callables_are_contexts_too(store: EpisodeStore) -> None:
    asked: list[Any] = []

    def source(episodes: Any, starts: Any, length: int) -> Batch:
        asked.append((episodes.tolist(), starts.tolist(), length))
        return stacked([frames(store, e % 6, s, length) for e, s in zip(episodes, starts, strict=True)])

    env = dreaming(source, n=4, episodes=(100,))
    env.reset()
    assert asked == [([100], [0], WORLD.context_length)]
    env.reset(options={"episodes": [8, 7, 8, 9], "context": [3, 5, 3, 3], "start": 2})
    assert asked[1:] == [([8, 9], [2, 2], 3), ([7], [2], 5)]
    with pytest.raises(ConfigError, match="say which episodes to draw from"):
        dreaming(source).reset()
    with pytest.raises(ConfigError, match=r"asked for 1 contexts of 21 frames, got \(1, 20\)"):
        dreaming(lambda *_: frames(store, 0, 0, 20), episodes=(0,)).reset()


def test_a_memory_that_grows_dreams_to_the_horizon_together(store: EpisodeStore) -> None:
    model = world_model("full")
    with pytest.raises(ConfigError, match="must end together; use terminate_below=None"):
        dreaming(store, model, terminate_below=0.5).reset()
    env = dreaming(store, model, sample=False)
    first, steps = played(env, HORIZON + 2, options={"episodes": [0, 1, 2], "context": [9, 21, 4]})
    assert (steps[HORIZON][0] == first).all()
    env.reset(options={"episodes": [0, 1, 2], "context": [9, 21, 4]})
    env.step(np.random.default_rng(1).integers(3, size=(HORIZON + 2, 3))[-1])
    assert (env._seen == steps[-1][0]).all()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "short": ({"episodes": 0, "start": 10, "context": 18}, "episode 0 has 27 steps, no window of 18 from step 10"),
    "shorter": ({"context": 28}, "the longest episode has 27 steps, shorter than a window of 28"),
    "unknown": ({"episodes": [0, 1, 6]}, r"episode numbers lie in 0\.\.5, got 6"),
    "negative": ({"episodes": [0, 1, -1]}, r"episode numbers lie in 0\.\.5, got -1"),
    "before": ({"start": -1}, "no window of 21 from step -1"),
    "nothing": ({"context": 0}, "a context has at least 1 frame, got 0"),
    "names": ({"episode": 0}, "unknown option 'episode'; did you mean 'episodes'"),
    "number": ({"episodes": [0, 1]}, r"option 'episodes' is an integer or 3, got int64 \(2,\)"),
    "floats": ({"context": 3.5}, r"option 'context' is an integer or 3, got float64"),
}


@pytest.mark.parametrize("name", BAD)
def test_contexts_that_cannot_be_are_refused(store: EpisodeStore, name: str) -> None:
    options, message = BAD[name]
    env = dreaming(store)
    with pytest.raises(RecollectError, match=message) as error:
        env.reset(options=options)
    assert "\n" not in str(error.value)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(3, dtype=np.int64))


def test_misuse(store: EpisodeStore) -> None:
    env = dreaming(store)
    for call in (lambda: env.step(np.zeros(3, np.int64)), lambda: env.state, lambda: env.spans, env.render):
        with pytest.raises(gymnasium.error.ResetNeeded, match="call reset"):
            call()
    env.reset(seed=0)
    assert env.render() is None
    for wrong, message in (
        (np.zeros(2, np.int64), r"actions are 3 integers, got int64 \(2,\)"),
        (np.zeros((3, 3)), r"actions are 3 integers, got float64 \(3, 3\)"),
        (np.array([0, 3, 1]), r"actions lie in 0\.\.2, got 0\.\.3"),
    ):
        with pytest.raises(gymnasium.error.InvalidAction, match=message):
            env.step(wrong)
    for name in ("horizon", "context"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
            dreaming(store, **{name: 0})
    with pytest.raises(ConfigError, match="num_envs must be at least 1"):
        dreaming(store, n=0)
    with pytest.raises(ConfigError, match="render_mode is 'rgb_array' or None, got 'ansi'"):
        dreaming(store, render_mode="ansi")


def test_a_trained_run_is_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "episodes"))
    train(load_recipe("demo-smoke").pick("s5", "world"), tmp_path / "run")
    env = imagined_env(tmp_path / "run", num_envs=3, terminate_below=None)
    _, steps = played(env, 6, seed=0)
    assert [bool(step[3].all()) for step in steps] == [False] * 5 + [True]
    assert (env.spans[:, 2] == 21).all()
    assert env.spans[:, 0].max() < 8
    env = imagined_env(tmp_path / "run", num_envs=2, split="valid", context=4, horizon=2, reward_above=0.99)
    first, steps = played(env, 2, options={"episodes": [3, 1]})
    assert first.shape == (2, 5, 5)
    assert not index_batch(env.state.h, torch.tensor([0])).isnan().any()
    assert (env.spans[:, 2] == 4).all()
    assert (np.stack([step[1] for step in steps]) == 0).all()
