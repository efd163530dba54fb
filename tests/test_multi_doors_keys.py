"""Multi Doors Keys: rules, scripted walks, what is seen when, and that door states follow from memory alone."""

from __future__ import annotations

import hashlib
from itertools import permutations
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from recollect.core.config import from_dict, to_dict
from recollect.core.errors import ConfigError
from recollect.envs import ENVS, MultiDoorsKeys, find, register
from recollect.envs.base import Frames
from recollect.envs.door_key_oracle import UNKNOWN, foretell
from recollect.envs.door_key_walks import PICKUP, TOGGLE, Layout, columns, walk
from recollect.envs.grid_world import FORWARD, LEFT, RIGHT, STEPS
from recollect.envs.multi_doors_keys import draw, play
from recollect.envs.tiles import (
    COLOURS,
    EMPTY,
    FIRST_AGENT,
    FIRST_AGENT_IN_DOOR,
    FIRST_KEY,
    FIRST_LOCKED,
    FIRST_OPEN,
    N_CODES,
    WALL,
    render,
    text,
)

Config = MultiDoorsKeys.Config
GREEN, BLUE = 0, 1


def layout_of(doors: list[int], keys: list[int]) -> Layout:
    """An episode with these colours, for stepping by hand."""
    drawn = draw(Config(len(doors)), np.random.default_rng(0), 1)
    return drawn._replace(door_colours=np.array([doors], np.uint8), key_colours=np.array([keys], np.uint8))


def stepper(doors: list[int], keys: list[int]) -> MultiDoorsKeys:
    env = MultiDoorsKeys(Config(len(doors)))
    env.reset(options={"layout": layout_of(doors, keys)})
    return env


def act(env: MultiDoorsKeys, actions: str) -> dict[str, Any]:
    """Play L, R, F, P, T; what the world is then."""
    for name in actions:
        env.step("LRFPT".index(name))
    return env.hidden_state()


@pytest.fixture(scope="module")
def frames() -> Frames:
    return Config(5).generate(np.random.default_rng(0), 300)


def tries(frames: Frames) -> tuple[np.ndarray, np.ndarray]:
    """(episode, t) of every frame that a toggle led to."""
    return np.nonzero((frames["action"] == TOGGLE) & ~frames["is_first"])


def test_published_lengths():
    lengths = {n: (Config(n).context_length, Config(n).query_length) for n in (3, 5, 7)}
    assert lengths == {3: (76, 174), 5: (170, 380), 7: (296, 654)}
    assert all(Config(n).episode_length == -(-25 * (n * n + 4 * n - 1) // 2) for n in range(1, 21))


@pytest.mark.parametrize("observation", ["tiles", "pixels"])
def test_gymnasium_accepts_it_without_a_warning(observation: str):
    register()
    made = gymnasium.make("recollect/multi-doors-keys-3-v0", pixels=observation == "pixels")
    assert made.unwrapped.config == ENVS["multi-doors-keys-3"]  # pyright: ignore[reportAttributeAccessIssue]
    check_env(made.unwrapped)


def test_grid_has_the_documented_walls():
    env = stepper([0, 1, 2], [2, 0, 1])
    assert text(env.grid(), colour=False).splitlines() == [
        "##########################",
        "##      ##      ##      ##",
        "####Dg######Db######Dp####",
        "##                      ##",
        "##          >           ##",
        "##                      ##",
        "####  ######  ######  ####",
        "##  kp  ##  kg  ##  kb  ##",
        "##########################",
    ]


class TestRules:
    def test_walls_doors_and_keys_stand_in_the_way(self):
        env = stepper([0, 1, 2], [2, 0, 1])
        assert act(env, "LFF")["position"] == (6, 3)  # the door above stays locked
        assert act(env, "LF")["position"] == (5, 3)
        assert act(env, "RF")["position"] == (5, 3)  # a wall
        assert act(env, "RFRFFF")["position"] == (6, 6)
        assert act(env, "F")["position"] == (6, 6)  # a key
        assert act(env, "PF")["position"] == (6, 7)
        assert act(env, "FLF")["position"] == (7, 7)
        assert act(env, "F")["position"] == (7, 7)

    def test_a_key_opens_one_door_of_its_colour_and_is_consumed(self):
        env = stepper([GREEN, GREEN, BLUE], [GREEN, GREEN, BLUE])
        world = act(env, "LLFFFFLFFP")  # the green key on the left
        assert (world["carried"], world["keys"]) == ((1, 0, 0, 0), (False, True, True))
        assert act(env, "LLFFFT")["doors"] == (True, False, False)
        world = act(env, "RFFFFLT")  # the other green door: the key is gone
        assert (world["carried"], world["doors"]) == ((0, 0, 0, 0), (True, False, False))
        world = act(env, "LLFFFPLLFFFT")
        assert (world["carried"], world["doors"]) == ((0, 0, 0, 0), (True, True, False))
        assert act(env, "FF")["position"] == (6, 1)  # through the door

    def test_a_key_of_another_colour_opens_nothing_and_is_kept(self):
        env = stepper([GREEN, BLUE, BLUE], [BLUE, GREEN, BLUE])
        world = act(env, "LLFFFFLFFPLLFFFT")
        assert (world["carried"], world["doors"]) == ((0, 1, 0, 0), (False, False, False))
        world = act(env, "RFFFFRFFFPLLFFFT")  # now green and blue: the blue one opens
        assert (world["carried"], world["doors"]) == ((1, 0, 0, 0), (False, True, False))

    def test_nothing_happens_where_there_is_nothing(self):
        env = stepper([GREEN, GREEN, BLUE], [GREEN, GREEN, BLUE])
        before = env.hidden_state()
        assert act(env, "PT") == before
        opened = act(env, "RFFPLLFFFT")
        assert opened["doors"] == (False, True, False)
        assert act(env, "TP") == opened  # an open door stays open, and is no key
        assert act(env, "T") == opened

    def test_a_door_and_a_key_are_taken_from_the_tile_before_them_only(self):
        env = stepper([GREEN, GREEN, BLUE], [GREEN, GREEN, BLUE])
        assert act(env, "RFP")["carried"] == (0, 0, 0, 0)
        assert act(env, "FPLLFFT")["doors"] == (False, False, False)
        assert act(env, "FT")["doors"] == (False, True, False)

    def test_it_is_cut_off_and_never_ends_otherwise(self):
        env = MultiDoorsKeys(Config(1))
        env.reset(seed=0)
        ends = [env.step(LEFT)[1:4] for _ in range(2 * Config(1).episode_length)]
        assert set(ends[:-1]) == {(0.0, False, False)}
        assert ends[-1] == (0.0, False, True)
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(LEFT)

    def test_misuse(self):
        env = MultiDoorsKeys(render_mode="ansi")
        for call in (lambda: env.step(0), env.hidden_state, env.scripted_actions, env.render, env.grid):
            with pytest.raises(gymnasium.error.ResetNeeded):
                call()
        env.reset(seed=0)
        with pytest.raises(gymnasium.error.InvalidAction, match="3 pickup, 4 toggle, got 5"):
            env.step(5)
        assert isinstance(env.render(), str)


@pytest.mark.parametrize(("n", "n_colours", "attempts"), [(1, 4, 2), (2, 2, 1), (3, 4, 2), (4, 3, 3), (7, 4, 2)])
def test_generator_equals_stepping_the_environment(n: int, n_colours: int, attempts: int):
    config = Config(n, n_colours, attempts)
    layout = draw(config, np.random.default_rng(n), 5)
    frames = play(config, layout)
    assert frames["tiles"].shape == (5, config.episode_length, 5, 5)
    env = config.build()
    for i in range(5):
        observation, _ = env.reset(options={"layout": Layout(*(part[i : i + 1] for part in layout))})
        actions = env.scripted_actions()
        assert len(actions) == config.episode_length - 1
        for t in range(config.episode_length):
            action = int(actions[t - 1]) if t else 0
            if t:
                observation, reward, terminated, truncated, _ = env.step(action)
                assert (reward, terminated, truncated) == (0.0, False, False)
            assert frames["action"][i, t] == action
            assert (frames["tiles"][i, t] == observation).all(), (i, t)
            for key, value in env.hidden_state().items():
                assert np.array_equal(frames[key][i, t], value), (key, i, t)
    assert frames["is_first"][:, 0].all()
    assert frames["is_last"][:, -1].all()
    assert frames["is_first"].sum() == frames["is_last"].sum() == 5
    assert not frames["is_terminal"].any()
    assert not frames["reward"].any()


def test_pictures_are_the_tiles():
    tiles, pixels = Config(3).build(), Config(3).build(pixels=True, render_mode="rgb_array")
    codes, _ = tiles.reset(seed=1)
    picture, _ = pixels.reset(seed=1)
    for action in tiles.scripted_actions()[:120].tolist():
        assert (render(codes) == picture).all()
        assert np.array_equal(pixels.render(), picture)
        codes, picture = tiles.step(action)[0], pixels.step(action)[0]


def test_an_episode_is_the_same_alone_and_among_others():
    config = Config(4)
    layout = draw(config, np.random.default_rng(1), 20)
    together = play(config, layout)
    for i in (0, 7, 19):
        alone = play(config, Layout(*(part[i : i + 1] for part in layout)))
        assert all((alone[key][0] == together[key][i]).all() for key in together)


def test_a_seeded_reset_is_the_first_generated_episode():
    config = Config(3)
    env = config.build()
    for seed in range(3):
        env.reset(seed=seed)
        assert (env.scripted_actions() == config.generate(np.random.default_rng(seed), 1)["action"][0, 1:]).all()


def test_same_seed_same_bytes_and_pinned():
    def digest(seed: int) -> str:
        frames = Config(3).generate(np.random.default_rng(seed), 8)
        return hashlib.sha256(b"".join(frames[key].tobytes() for key in sorted(frames))).hexdigest()[:16]

    assert digest(3) == digest(3)
    assert digest(3) != digest(4)
    # Another digest means that every published number was measured on other data: say so in the changelog.
    assert digest(3) == "73617ae7b0bcb4ba"


class TestContext:
    def test_nothing_is_used_and_everything_is_seen(self, frames: Frames):
        C = Config(5).context_length
        assert not np.isin(frames["action"][:, :C], [PICKUP, TOGGLE]).any()
        assert not frames["doors"][:, :C].any()
        assert frames["keys"][:, :C].all()
        for row, first_code, colours in ((2, FIRST_LOCKED, "door_colours"), (7, FIRST_KEY, "key_colours")):
            for i, column in enumerate(columns(5).tolist()):
                seen = self.seen_at(frames, column, row, C)
                expected = frames[colours][:, 0, i] + first_code
                assert (seen == expected[:, None]).any(axis=1).all()
                assert ((seen == expected[:, None]) | (seen == UNKNOWN)).all()

    @staticmethod
    def seen_at(frames: Frames, column: int, row: int, before: int) -> np.ndarray:
        """What is shown of one tile in the first frames; UNKNOWN where it is out of sight."""
        x, y = np.moveaxis(frames["position"][:, :before].astype(np.int64), -1, 0)
        i, j = row - y + 2, column - x + 2
        inside = (i >= 0) & (i < 5) & (j >= 0) & (j < 5)
        shown = np.take_along_axis(
            frames["tiles"][:, :before].reshape(*x.shape, 25), np.where(inside, 5 * i + j, 0)[..., None], 2
        )[..., 0]
        return np.where(inside, shown, UNKNOWN)

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_every_order_fits(self, n: int):
        self.all_visited(Config(n), np.array(list(permutations(range(2 * n))), dtype=np.uint8))

    @pytest.mark.parametrize("n", [4, 5, 6, 7, 20])
    def test_the_longest_ways_fit(self, n: int):
        """From one half to the other with every visit, and from doors to keys, which takes most turns."""
        doors = np.argsort(np.abs(np.arange(n) - (n - 1) / 2))[::-1]
        left, right = doors[doors < n // 2], doors[doors >= n - n // 2]
        pairs = [np.stack([left, right + n], 1), np.stack([left + n, right], 1)]
        middle = [n // 2, n + n // 2] if n % 2 else []
        orders = [np.concatenate([a.ravel(), b.ravel(), middle]) for a, b in (pairs, pairs[::-1])]
        self.all_visited(Config(n), np.array(orders).astype(np.uint8))

    @staticmethod
    def all_visited(config: MultiDoorsKeys.Config, orders: np.ndarray) -> None:
        n = config.n_doors
        drawn = draw(config, np.random.default_rng(0), len(orders))._replace(tour=orders)
        position = play(config, drawn)["position"][:, : config.context_length]
        for i, column in enumerate(columns(n).tolist()):
            for row, name in ((3, "door"), (6, "key")):
                assert (position == (column, row)).all(axis=2).any(axis=1).all(), (name, i)


class TestQuery:
    @pytest.mark.parametrize("n", [1, 3, 5, 7])
    def test_all_is_picked_up_and_opened_in_time(self, n: int):
        frames = Config(n).generate(np.random.default_rng(1), 400)
        assert frames["doors"][:, -1].all()
        assert not frames["keys"][:, -1].any()
        assert not frames["carried"][:, -1].any()

    def test_two_doors_are_tried_after_each_key_and_then_the_rest(self, frames: Frames):
        for actions, doors in zip(frames["action"], frames["doors"].sum(axis=2), strict=True):
            used = [(int(a), int(k)) for a, k in zip(actions[1:], doors[1:], strict=True) if a in (PICKUP, TOGGLE)]
            order = "".join("PT"[a == TOGGLE] for a, _ in used)
            parts = [len(part) for part in order.split("P")]
            assert parts[0] == 0
            assert len(parts) == 6
            # After four keys there may be one locked door left, or none, to try; after the last all are opened.
            assert parts[1:4] == [2, 2, 2]
            assert parts[4] in (1, 2)
            assert parts[5] == 5 - used[[i for i, (a, _) in enumerate(used) if a == PICKUP][-1]][1]

    def test_a_door_is_not_tried_twice_in_a_row_nor_when_open(self, frames: Frames):
        episode, t = tries(frames)
        heading = frames["heading"][episode, t].astype(np.int64)
        assert (heading == 3).all()
        assert (frames["position"][episode, t, 1] == 3).all()
        door = (frames["position"][episode, t, 0] - 2) // 4
        assert not frames["doors"][episode, t - 1, door].any()
        same = (episode[1:] == episode[:-1]) & (door[1:] == door[:-1])
        picked = frames["keys"].sum(axis=2)[episode, t]
        assert (picked[1:][same] < picked[:-1][same]).all()

    def test_a_door_opens_where_a_key_of_its_colour_is_left(self, frames: Frames):
        episode, t = tries(frames)
        door = (frames["position"][episode, t, 0] - 2) // 4
        colour = frames["door_colours"][episode, t, door]
        opens = frames["doors"][episode, t, door]
        assert (opens == (frames["carried"][episode, t - 1, colour] > 0)).all()
        used = frames["carried"][episode, t - 1, colour] - frames["carried"][episode, t, colour]
        assert (used == opens).all()

    def test_the_scene_changes_where_and_when_it_should(self, frames: Frames):
        """The tile ahead becomes an open door, or an empty one where a key was, in the frame of the action."""
        step = STEPS[frames["heading"].astype(np.int64)]
        ahead = frames["tiles"][np.arange(300)[:, None], np.arange(550), 2 + step[..., 1], 2 + step[..., 0]]
        picked = (frames["action"] == PICKUP).nonzero()
        assert (ahead[picked] == EMPTY).all()
        assert ((ahead[picked[0], picked[1] - 1] - FIRST_KEY) < 4).all()
        episode, t = tries(frames)
        door = (frames["position"][episode, t, 0] - 2) // 4
        opens = frames["doors"][episode, t, door]
        colour = frames["door_colours"][episode, t, door]
        assert (ahead[episode, t] == np.where(opens, FIRST_OPEN, FIRST_LOCKED) + colour).all()
        assert (ahead[episode, t - 1] == FIRST_LOCKED + colour).all()

    def test_all_kinds_of_tiles_are_seen(self, frames: Frames):
        on_floor = {EMPTY, WALL, *range(FIRST_AGENT, FIRST_AGENT + 4), *range(FIRST_LOCKED, FIRST_AGENT_IN_DOOR)}
        in_doors = {FIRST_AGENT_IN_DOOR + 4 * c + heading for c in range(4) for heading in (1, 3)}
        assert set(np.unique(frames["tiles"]).tolist()) - in_doors <= on_floor | set(
            range(FIRST_AGENT_IN_DOOR, N_CODES)
        )
        assert on_floor | in_doors <= set(np.unique(frames["tiles"]).tolist())


class TestMemory:
    @pytest.mark.parametrize("n", [1, 2, 3, 5])
    def test_a_map_kept_up_by_the_rules_foretells_everything(self, n: int):
        config = Config(n)
        frames = config.generate(np.random.default_rng(2), 60)
        assert config.oracle(frames) == {"doors": 1.0, "view": 1.0}
        assert (foretell(frames, n, config.context_length) == UNKNOWN).mean() < 0.1

    def test_without_the_context_it_cannot_know(self):
        config = Config(5)
        frames = config.generate(np.random.default_rng(2), 60)
        context = np.arange(config.episode_length)[:, None, None] < config.context_length
        tiles = frames["tiles"]
        for first in (FIRST_KEY, FIRST_LOCKED):
            colourless = np.where(context & (tiles >= first) & (tiles < first + 4), first, tiles)
            scores = config.oracle({**frames, "tiles": colourless})
            assert max(scores.values()) < 0.75

    def test_the_oracle_follows_any_walk(self):
        """Someone who bumps, picks up and opens at random, in the context too."""
        config = Config(3)
        env = config.build()
        rng = np.random.default_rng(0)
        tiles, actions = [env.reset(seed=0)[0]], [0]
        while len(tiles) < config.episode_length:
            actions.append(int(rng.choice(5, p=[0.1, 0.1, 0.5, 0.15, 0.15])))
            tiles.append(env.step(actions[-1])[0])
        frames = {"tiles": np.stack(tiles)[None], "action": np.array([actions], np.uint8)}
        predicted = foretell(frames, 3, 120)
        shown = frames["tiles"][:, 120:]
        assert ((predicted == shown) | (predicted == UNKNOWN)).all()
        assert (predicted != UNKNOWN).mean() > 0.5

    @pytest.mark.parametrize("n", [3, 5, 7])
    def test_without_memory_it_is_guesswork(self, n: int):
        """The best guess from how many keys were picked up and how many doors were tried since, fitted to the data."""
        frames = Config(n).generate(np.random.default_rng(3), 1000)
        episode, t = tries(frames)
        opens = frames["doors"].sum(axis=2)[episode, t] > frames["doors"].sum(axis=2)[episode, t - 1]
        assert 0.4 < opens.mean() < 0.65
        keys = n - frames["keys"].sum(axis=2)[episode, t]
        since = np.array(
            [
                k - np.searchsorted(episode * n + keys, e * n + key)
                for k, (e, key) in enumerate(zip(episode, keys, strict=True))
            ]
        )
        groups = np.minimum(since, 2) + 3 * keys
        known = sum(max(opens[groups == g].sum(), (~opens[groups == g]).sum()) for g in np.unique(groups))
        assert known / len(opens) < 0.8

    def test_colours_are_fair_and_keys_fit_the_doors(self):
        layout = draw(Config(5, n_colours=3), np.random.default_rng(0), 4000)
        assert (np.sort(layout.door_colours) == np.sort(layout.key_colours)).all()
        for drawn in (layout.door_colours, layout.key_colours):
            assert np.abs(np.stack([(drawn == c).mean(axis=0) for c in range(3)]) - 1 / 3).max() < 0.03
            assert drawn.max() == 2
        # Where a key lies says nothing of the door above it beyond its share of the colours.
        same = (layout.door_colours == layout.key_colours).mean(axis=0)
        assert np.abs(same - (1 / 5 + 4 / 5 / 3)).max() < 0.03

    def test_choices_are_even(self):
        """The first door tried is any door; the first key picked up any key."""
        layout = draw(Config(4), np.random.default_rng(0), 4000)
        frames = play(Config(4), layout)
        first = (frames["action"] == TOGGLE).argmax(axis=1)
        door = (frames["position"][np.arange(4000), first, 0] - 2) // 4
        assert np.abs(np.bincount(door, minlength=4) / 4000 - 0.25).max() < 0.03
        assert np.abs(np.bincount(layout.key_order[:, 0], minlength=4) / 4000 - 0.25).max() < 0.03


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_doors": 0}, "n_doors must lie in 1..20, got 0"),
        ({"n_doors": 21}, "n_doors must lie in 1..20, got 21"),
        ({"n_colours": 1}, "n_colours must lie in 2..4, got 1"),
        ({"n_colours": 5}, "n_colours must lie in 2..4, got 5"),
        ({"attempts": 0}, "attempts must lie in 1..20, got 0"),
    ],
)
def test_impossible_configs(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as error:
        Config(**values)
    assert "\n" not in str(error.value)


def test_registry_and_config_data():
    assert find("multi-doors-keys-5") == Config(5)
    config = Config(4, 3, 1)
    assert from_dict(Config, to_dict(config)) == config
    assert len(COLOURS) == 4
    assert config.actions[FORWARD] == "forward"
    assert (config.actions[LEFT], config.actions[RIGHT]) == ("left", "right")
    assert (config.actions[PICKUP], config.actions[TOGGLE]) == ("pickup", "toggle")


def test_walks_never_run_out_of_choices():
    """Hallways of one door are the worst: the shortest ways, over and over."""
    for n, attempts in ((1, 20), (2, 20), (1, 1)):
        config = Config(n, attempts=attempts)
        layout = draw(config, np.random.default_rng(0), 50)
        walk(layout, config.context_length, config.query_length, attempts)
