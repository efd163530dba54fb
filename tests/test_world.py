"""World problems: what is trained on, how dreams are scored and drawn, and probes."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recollect.core.errors import ConfigError, RunError
from recollect.core.files import locked
from recollect.core.seeding import Streams
from recollect.core.state import nbytes
from recollect.envs import DistractingMemory, Maze, MemoryMaze, MultiDoorsKeys, Rooms
from recollect.envs.tiles import N_CODES, render
from recollect.eval.imagination import Dream, Gallery, Scores, joined, squared_error
from recollect.eval.pictures import save_strips, tiles_of
from recollect.layers.attention import Attention
from recollect.models.backbone import Backbone
from recollect.models.latent import LatentConfig
from recollect.models.probe import Asked, Probe
from recollect.models.s4wm import S4WM
from recollect.models.vision import Pixels
from recollect.models.world_model import WorldModel
from recollect.recipes import load_recipe
from recollect.train.batches import digest
from recollect.train.loop import train
from recollect.train.prefetch import batches
from recollect.train.run import RunConfig
from recollect.train.world import World, WorldConfig, imagine_run
from toy_env import ToyEnv

BACKBONE = Backbone.Config(8, layers=(Attention.Config(8, n_heads=2, window=9),))


@pytest.fixture(autouse=True)
def _data_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path_factory.getbasetemp() / "episodes"))


def smoke(row: str) -> RunConfig:
    return load_recipe("demo-smoke").pick(row, "world")


def world_config(observation: str = "tiles") -> WorldConfig:
    return WorldConfig(
        env=DistractingMemory.Config(width=11),
        dynamics=S4WM.Config(BACKBONE, latent=LatentConfig(groups=2, classes=4), hidden=8),
        observation="pixels" if observation == "pixels" else "tiles",
        hidden=8,
        depth=2,
        batch_size=2,
        n_episodes=6,
        n_valid=3,
        n_test=5,
    )


def dream_of(problem: World, model: WorldModel, episode: int) -> Dream:
    return problem.dream(model, "test", [episode], torch.Generator().manual_seed(0))


class TestWorld:
    @pytest.mark.parametrize("observation", ["tiles", "pixels"])
    def test_a_step_and_an_evaluation(self, observation: str) -> None:
        problem = world_config(observation).build()
        model = problem.build_model()
        batch = problem.batch(1, Streams(0), torch.device("cpu"))
        assert batch.observation.shape == (2, 27, 5, 5)
        frame = (40, 40, 3) if observation == "pixels" else (5, 5)
        assert problem.see(batch).observation.shape == (2, 27, *frame)
        assert (batch.action[:, 0] == 0).all()
        assert (batch.action[:, 1:].sum(-1) == 1).all()
        loss, numbers = problem.loss(model, batch, torch.Generator().manual_seed(0))
        loss.backward()
        assert {"image", "kl", "reward"} <= set(numbers)
        assert all(p.grad is not None for p in model.parameters())
        scored = problem.evaluate(model.eval(), Streams(0), final=True)
        assert len(scored.details["generation_mse_curve"]) == scored.details["query"] == 6
        assert np.mean(scored.details["generation_mse_curve"]) == pytest.approx(scored.metrics["generation_mse"])
        frames = np.concatenate([dream_of(problem, model, i).truth_pictures[0] for i in range(5)]) / 255.0
        assert len(scored.details["surprise_curve"]) == scored.details["context"] + 6 - 1
        around = ((frames - frames.mean(0)) ** 2).sum((1, 2, 3)).mean()
        assert scored.details["mean_picture_mse"] == pytest.approx(around)
        assert scored.arrays["strip_truth"].shape == scored.arrays["strip_imagined"].shape == (4, 6, 40, 40, 3)
        assert problem.describe(model)["state_bytes"] == nbytes(model.init_state(1)._replace(h=torch.zeros(0)))

    def test_pictures_are_dreamed_twice_in_the_end(self) -> None:
        problem = World(replace(world_config("pixels"), env=ToyEnv.Config()))
        model = problem.build_model().eval()
        last = problem.evaluate(model, Streams(0), final=True)
        curve = last.details["expectation_mse_curve"]
        assert np.mean(curve) == pytest.approx(last.metrics["expectation_mse"])
        assert last.metrics["expectation_mse"] < last.metrics["generation_mse"], "an untrained model guesses"
        assert "expectation_mse" not in problem.evaluate(model, Streams(0), final=False).metrics
        tiles = world_config().build()
        assert "expectation_mse" not in tiles.evaluate(tiles.build_model(), Streams(0), final=True).metrics

    def test_splits_share_no_episode_and_stores_are_made_once(self) -> None:
        problem = World(world_config())
        again = World(world_config())
        episodes = {split: problem._windows(split).batch_at(range(3)) for split in ("train", "valid", "test")}
        assert not np.array_equal(episodes["train"]["tiles"], episodes["valid"]["tiles"])
        assert not np.array_equal(episodes["valid"]["tiles"], episodes["test"]["tiles"])
        path = problem._windows("train").store.path
        made = (path / "meta.json").stat().st_mtime_ns
        assert again._windows("train").store.path == path
        assert (path / "meta.json").stat().st_mtime_ns == made

    def test_a_store_that_another_run_is_making_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path))
        World(world_config())._windows("valid")
        (lock,) = tmp_path.glob("*-valid-*.lock")
        with ThreadPoolExecutor() as pool:
            with locked(lock, wait=True):
                waiting = pool.submit(World(world_config())._windows, "valid")
                with pytest.raises(TimeoutError):
                    waiting.result(timeout=0.3)
            assert len(waiting.result(timeout=30)) == 3

    def test_pictures_come_from_the_store_and_decide_the_size(self) -> None:
        with pytest.raises(ConfigError, match="toy-pictures shows no tiles; use observation=pixels"):
            replace(world_config(), env=ToyEnv.Config())
        problem = World(replace(world_config("pixels"), env=ToyEnv.Config()))
        batch = problem.batch(1, Streams(0), torch.device("cpu"))
        numbers = Streams(0).numpy("data", "train", 1).integers(6, size=2)
        store = problem._windows("train").store
        assert (batch.observation.numpy() == np.stack([store.episode(i)["image"] for i in numbers])).all()
        vision = replace(world_config("pixels"), env=MemoryMaze.Config()).model().vision
        assert isinstance(vision, Pixels)
        assert vision.size == 64

    def test_batches_made_ahead_are_the_same_bits(self) -> None:
        run = replace(smoke("gru"), problem=world_config("pixels"))
        assert isinstance(run.problem, WorldConfig)
        cpu = torch.device("cpu")
        problem = run.problem.build()
        with batches(run, problem, 1, cpu, 0) as here, batches(run, problem, 1, cpu, 2) as ahead:
            assert [digest(here(step)) for step in (1, 2, 3)] == [digest(ahead(step)) for step in (1, 2, 3)]


class TestDream:
    def scores(self, n: int = 4, generation: float = 0.0) -> Scores:
        return Scores(
            reconstruction=np.full((n, 4), 2.0),
            generation=np.full((n, 2), generation),
            reward_true=np.array([1, 0, 1, 0], np.float32)[:n],
            reward_inferred=np.array([0.9, 0.1, 0.6, 0.4], np.float32)[:n],
            reward_imagined=np.array([0.9, 0.9, 0.1, 0.4], np.float32)[:n],
            expectation=np.zeros((n, 0)),
            surprise=np.tile([6.0, 10.0, 3.0, 1.0], (n, 1)),
        )

    def dreams(self, *errors: float) -> Dream:
        n = len(errors)
        scores = replace(self.scores(n), generation=np.repeat(np.array(errors)[:, None], 2, 1))
        shape = (n, 2, 40, 40, 3)
        return Dream(scores, np.zeros(shape, np.uint8), np.zeros(shape, np.uint8), np.full(shape, 51, np.uint8))

    def test_accuracies_count_the_right_side_of_a_half(self) -> None:
        assert self.scores().rewards() == {"inference_accuracy": 1.0, "imagination_accuracy": 0.5}

    def test_a_query_that_was_foretold_surprises_less(self) -> None:
        errors = self.scores().errors(1)
        assert (errors["surprise_context"], errors["surprise_query"]) == (8.0, 2.0)
        assert errors["recalled"] == 0.75

    def test_errors_tell_context_and_query_apart(self) -> None:
        reconstruction = np.array([[1.0, 2.0, 6.0, 8.0]] * 4)
        scores = replace(self.scores(generation=4.8), reconstruction=reconstruction)
        assert scores.context == 3
        errors = scores.errors(4800)
        assert errors["reconstruction_mse"] == 4.25
        assert errors["reconstruction_mse_context"] == 1.5
        assert errors["reconstruction_mse_query"] == 7.0
        assert errors["generation_mse"] == pytest.approx(4.8)
        assert errors["generation_psnr"] == pytest.approx(30.0)

    def test_batches_join_in_order(self) -> None:
        whole = joined([self.scores(2, 1.0), self.scores(4, 3.0)])
        assert whole.generation[:, 0].tolist() == [1, 1, 3, 3, 3, 3]
        assert whole.reward_true.tolist() == [1, 0, 1, 0, 1, 0]

    def test_errors_are_summed_over_a_frame(self) -> None:
        result = self.dreams(0, 0)
        error = squared_error(result.truth_pictures, result.imagined_pictures)
        np.testing.assert_allclose(error, np.full((2, 2), 4800 * 0.04), rtol=1e-12)

    def test_a_gallery_keeps_the_first_the_best_and_the_worst(self) -> None:
        gallery = Gallery(n=2)
        assert gallery.arrays() == {}
        for errors in ((5.0, 1.0, 9.0), (0.5, 3.0), (7.0,)):
            gallery.show(self.dreams(*errors))
        arrays = gallery.arrays()
        assert arrays["strip_number"].tolist() == [0, 1]
        assert arrays["best_number"].tolist() == [3, 1]
        assert arrays["worst_number"].tolist() == [2, 5]
        assert arrays["worst_error"].tolist() == [9.0, 7.0]
        assert arrays["strip_step"].tolist() == [3, 4]
        assert arrays["best_imagined"].shape == (2, 2, 40, 40, 3)

    def test_strips_are_drawn_truth_over_imagination(self, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        gallery = Gallery(n=2)
        gallery.show(self.dreams(0, 0, 0))
        path = save_strips(gallery.arrays(), tmp_path / "out", scale=1, gap=2)
        drawn = np.asarray(image.open(path))
        assert drawn.shape == (2 * (84 + 4), 84, 3)
        assert (drawn[:40, :40] == 0).all()
        assert (drawn[42:82, :40] == 51).all()
        with np.load(tmp_path / "out" / "strips.npz") as arrays:
            assert arrays["strip_step"].tolist() == [3, 4]
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="is a file"):
            save_strips(gallery.arrays(), tmp_path / "file")


def test_tiles_are_told_from_blurred_pictures() -> None:
    codes = np.arange(N_CODES, dtype=np.uint8)[None, :, None]
    drawn = render(codes)
    noise = np.random.default_rng(0).integers(-20, 21, drawn.shape)
    assert (tiles_of(np.clip(drawn + noise, 0, 255).astype(np.uint8), N_CODES) == codes).all()


class TestFamilies:
    """What is measured follows from the environment."""

    def config(self, env: Any, **changes: Any) -> WorldConfig:
        pictures = env.observation == "image"
        return replace(world_config("pixels" if pictures else "tiles"), env=env, n_test=2, n_valid=2, **changes)

    def test_doors_are_judged_as_seen_and_as_imagined(self) -> None:
        env = MultiDoorsKeys.Config(2)
        for observation in ("tiles", "pixels"):
            problem = replace(self.config(env), observation=observation).build()
            assert (problem.headline, problem.higher_is_better) == ("generation_mse", False)
            metrics = problem.evaluate(problem.build_model().eval(), Streams(0), final=True).metrics
            assert 0 <= metrics["doors_accuracy"] <= 1
            assert 0 <= metrics["view_accuracy"] < 0.5
            assert "imagination_accuracy" not in metrics

    def test_what_is_imagined_perfectly_is_judged_perfect(self) -> None:
        env = MultiDoorsKeys.Config(2)
        frames = env.generate(np.random.default_rng(0), 3)
        truth = frames["tiles"][:, env.context_length :]
        assert env.judge(truth, frames) == {"doors": 1.0, "view": 1.0}
        assert env.judge(np.zeros_like(truth), frames) == {"doors": 0.0, "view": 0.0}

    def test_a_longer_environment_is_tested_on_as_well(self) -> None:
        problem = self.config(DistractingMemory.Config(11), longer=DistractingMemory.Config(13)).build()
        scored = problem.evaluate(problem.build_model().eval(), Streams(0), final=True)
        assert len(scored.details["longer_generation_mse_curve"]) == 7
        assert scored.metrics["longer_generation_mse"] == pytest.approx(
            np.mean(scored.details["longer_generation_mse_curve"])
        )
        with pytest.raises(ConfigError, match="rooms is not seen or acted in as distracting-memory is"):
            self.config(DistractingMemory.Config(11), longer=Rooms.Config())

    def test_mazes_are_probed(self) -> None:
        probe = Probe.Config(hidden=8, n_hidden=1, steps=2)
        problem = self.config(Maze.Config(9, side=8), n_episodes=2, batch_size=1, probe=probe).build()
        metrics = problem.evaluate(problem.build_model().eval(), Streams(0), final=True).metrics
        assert 0 < metrics["walls_accuracy"] < 1
        assert metrics["objects_rmse"] ** 2 == pytest.approx(metrics["objects_mse"])
        with pytest.raises(ConfigError, match="distracting-memory has nothing to probe for"):
            replace(world_config(), probe=probe)


def test_a_probe_reads_what_the_latent_holds_and_sends_nothing_back() -> None:
    """Layout and objects written into the features are read out again; random features give the constant answer."""
    rng = torch.Generator().manual_seed(0)
    layout = (torch.rand(512, 3, 3, generator=rng) < 0.5).to(torch.uint8)
    objects = 3 * torch.randn(512, 2, 2, generator=rng)
    asked = Asked(layout, torch.rand(512, 2, generator=rng), torch.rand(512, 2, generator=rng), objects)
    features = torch.cat([layout.flatten(1).float(), objects.flatten(1)], 1).requires_grad_()
    torch.manual_seed(0)
    probe = Probe(Probe.Config(hidden=128, n_hidden=2), 13, (3, 3), 2)
    optimizer = torch.optim.Adam(probe.parameters(), lr=3e-3)
    for _ in range(300):
        loss, _ = probe.loss(features, asked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, told = probe.loss(features, asked)
    assert features.grad is None
    assert told["walls_accuracy"].mean() > 0.99
    assert told["objects_mse"].mean() < 0.5
    walls, moved = probe(features, asked)
    by_hand = ((moved - objects) ** 2).sum(-1).mean(-1)
    torch.testing.assert_close(told["objects_mse"], by_hand.detach())
    assert walls.shape == (512, 3, 3)


def test_a_world_run_imagines_on_request(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    train(smoke("s5"), tmp_path / "run")
    path = imagine_run(tmp_path / "run", tmp_path / "out", episodes=2, seed=1)
    assert path.is_file()
    with np.load(tmp_path / "out" / "strips.npz") as arrays:
        assert arrays["strip_truth"].shape == (2, 6, 40, 40, 3)
    with pytest.raises(ConfigError, match=r"must be in 1\.\.8"):
        imagine_run(tmp_path / "run", tmp_path / "out", episodes=9)


def test_a_fresh_process_needs_to_import_nothing_else_to_imagine_a_run(tmp_path: Path) -> None:
    train(smoke("hax"), tmp_path / "run")
    code = "; ".join(
        (
            "from pathlib import Path",
            "from recollect.train.world import imagined_env",
            f"imagined_env(Path({str(tmp_path / 'run')!r}), num_envs=2).reset(seed=0)",
        )
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
