"""What the recipes train: recall and world problems, their scores, and real rows that stop and resume."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recollect.core.config import dumps, from_dict, to_dict
from recollect.core.errors import ConfigError, RunError
from recollect.core.files import locked
from recollect.core.seeding import Streams
from recollect.core.state import nbytes
from recollect.core.types import Aux
from recollect.envs import DistractingMemory, MemoryMaze
from recollect.eval.imagination import Dream, save_strips, squared_error, strip
from recollect.eval.recall import recall_scores
from recollect.layers.attention import Attention
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.models.latent import LatentConfig
from recollect.models.vision import Pixels
from recollect.ops.patterns import KeySelection, Lsh
from recollect.recipes import RECIPES, load_recipe
from recollect.tasks import JointRecall
from recollect.tasks.batch import TokenBatch
from recollect.tasks.oracles import ORACLES
from recollect.train.batches import digest
from recollect.train.loop import StoppedError, load_trained, train
from recollect.train.prefetch import batches
from recollect.train.recall import RecallConfig
from recollect.train.run import FaceOff, RunConfig
from recollect.train.world import World, WorldConfig, imagine_run
from toy_env import ToyEnv

TASK = JointRecall.Config(n_contexts=(2, 3), n_keys=(2, 4), n_values=5)


@pytest.fixture(autouse=True)
def _data_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path_factory.getbasetemp() / "episodes"))


def recall_config() -> RecallConfig:
    layer = HAX.Config(8, mixer=GRU.Config(8), patterns=(Lsh(4, n_bits=2), KeySelection(3)), d_key=4)
    return RecallConfig(TASK, Backbone.Config(8, layers=(GRU.Config(8), layer)), batch_size=3, valid_samples=2)


def world_config(observation: str = "tiles") -> WorldConfig:
    return WorldConfig(
        env=DistractingMemory.Config(width=11),
        backbone=Backbone.Config(8, layers=(Attention.Config(8, n_heads=2, window=9),)),
        observation="pixels" if observation == "pixels" else "tiles",
        latent=LatentConfig(groups=2, classes=4),
        hidden=8,
        depth=2,
        batch_size=2,
        n_episodes=6,
        n_valid=3,
        n_test=5,
    )


class TestRecall:
    def test_batches_are_addressed_by_step(self) -> None:
        problem, streams = recall_config().build(), Streams(3)
        one = problem.batch(7, streams, torch.device("cpu"))
        problem.batch(9, streams, torch.device("cpu"))
        again = problem.batch(7, streams, torch.device("cpu"))
        assert digest(one) == digest(again)
        assert digest(one) != digest(problem.batch(8, streams, torch.device("cpu")))

    def test_description_says_what_the_model_holds(self) -> None:
        problem = recall_config().build()
        model = problem.build_model()
        facts = problem.describe(model)
        assert facts["params"] == sum(p.numel() for p in model.parameters())
        assert facts["state_bytes"] == nbytes(model.backbone.init_state(1))
        assert facts["key_budget"] == 7

    def test_a_model_that_copies_scores_one_and_a_blind_one_scores_as_its_oracle(self) -> None:
        class Solver(LanguageModel):
            """Answers as an oracle does, which is told the labels by the test."""

            oracle = "perfect"

            def hidden(self, tokens: Tensor, state: object = None, **_: object) -> tuple[Tensor, object, Aux]:
                labels = torch.cat([tokens[:, 1:], tokens[:, -1:]], 1)
                mask = torch.zeros_like(tokens, dtype=torch.bool)
                batch = TokenBatch(tokens.numpy(), labels.numpy(), mask.numpy(), np.zeros((len(tokens), 2), np.int64))
                answers = torch.from_numpy(ORACLES[self.oracle](batch, JointRecall(TASK)))
                return torch.nn.functional.one_hot(answers, self.config.vocab_size).float(), state, {}

            def head(self, h: Tensor) -> Tensor:
                return h

        task = JointRecall(TASK)
        model = Solver(LanguageModel.Config(task.vocab_size, Backbone.Config(8, layers=(GRU.Config(8),))))
        scores = recall_scores(model, task, lambda cell: Streams(0).numpy("eval", "test", cell), 20)
        assert scores.accuracy.shape == (6,)
        assert scores.mean == 1.0
        assert (scores.all_correct == 1).all()
        model.oracle = "key-majority"
        blind = recall_scores(model, task, lambda cell: Streams(0).numpy("eval", "test", cell), 20)
        assert blind.mean == pytest.approx(blind.oracles["key-majority"])
        assert blind.mean < 0.8

    def test_evaluation_reports_every_cell(self) -> None:
        problem = recall_config().build()
        scored = problem.evaluate(problem.build_model().eval(), Streams(0), final=False)
        assert scored.details["cells"]["sizes"][:3] == [[2, 2], [2, 3], [2, 4]]
        assert np.mean(scored.details["cells"]["accuracy"]) == pytest.approx(scored.metrics["accuracy"])
        gap = scored.metrics["accuracy"] - scored.details["oracles"]["key-majority"]
        assert scored.metrics["binding_gap"] == pytest.approx(gap)


class TestWorld:
    @pytest.mark.parametrize("observation", ["tiles", "pixels"])
    def test_a_step_and_an_evaluation(self, observation: str) -> None:
        problem = world_config(observation).build()
        model = problem.build_model()
        batch = problem.batch(1, Streams(0), torch.device("cpu"))
        shape = (2, 27, 40, 40, 3) if observation == "pixels" else (2, 27, 5, 5)
        assert batch.observation.shape == shape
        assert (batch.action[:, 0] == 0).all()
        assert (batch.action[:, 1:].sum(-1) == 1).all()
        loss, numbers = problem.loss(model, batch, torch.Generator().manual_seed(0))
        loss.backward()
        assert {"image", "kl", "reward"} <= set(numbers)
        assert all(p.grad is not None for p in model.parameters())
        scored = problem.evaluate(model.eval(), Streams(0), final=True)
        assert len(scored.details["generation_mse_curve"]) == scored.details["query"] == 6
        assert np.mean(scored.details["generation_mse_curve"]) == pytest.approx(scored.metrics["generation_mse"])
        assert scored.arrays["strip_truth"].shape == scored.arrays["strip_imagined"].shape == (4, 6, 40, 40, 3)
        assert problem.describe(model)["state_bytes"] == nbytes(model.backbone.init_state(1))

    def test_splits_share_no_episode_and_stores_are_made_once(self) -> None:
        problem = World(world_config())
        again = World(world_config())
        episodes = {split: problem._split(split).batch_at(range(3)) for split in ("train", "valid", "test")}
        assert not np.array_equal(episodes["train"]["tiles"], episodes["valid"]["tiles"])
        assert not np.array_equal(episodes["valid"]["tiles"], episodes["test"]["tiles"])
        path = problem._split("train").store.path
        made = (path / "meta.json").stat().st_mtime_ns
        assert again._split("train").store.path == path
        assert (path / "meta.json").stat().st_mtime_ns == made

    def test_a_store_that_another_run_is_making_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path))
        World(world_config())._split("valid")
        (lock,) = tmp_path.glob("*-valid-*.lock")
        with ThreadPoolExecutor() as pool:
            with locked(lock, wait=True):
                waiting = pool.submit(World(world_config())._split, "valid")
                with pytest.raises(TimeoutError):
                    waiting.result(timeout=0.3)
            assert len(waiting.result(timeout=30)) == 3

    def test_pictures_come_from_the_store_and_decide_the_size(self) -> None:
        with pytest.raises(ConfigError, match="toy-pictures shows no tiles; use observation=pixels"):
            replace(world_config(), env=ToyEnv.Config())
        problem = World(replace(world_config("pixels"), env=ToyEnv.Config()))
        batch = problem.batch(1, Streams(0), torch.device("cpu"))
        numbers = Streams(0).numpy("data", "train", 1).integers(6, size=2)
        store = problem._split("train").store
        assert (batch.observation.numpy() == np.stack([store.episode(i)["image"] for i in numbers])).all()
        vision = replace(world_config("pixels"), env=MemoryMaze.Config()).model().vision
        assert isinstance(vision, Pixels)
        assert vision.size == 64

    def test_batches_made_ahead_are_the_same_bits(self) -> None:
        run = replace(smoke("world", "gru"), problem=world_config("pixels"))
        assert isinstance(run.problem, WorldConfig)
        cpu = torch.device("cpu")
        problem = run.problem.build()
        with batches(run, problem, 1, cpu, 0) as here, batches(run, problem, 1, cpu, 2) as ahead:
            assert [digest(here(step)) for step in (1, 2, 3)] == [digest(ahead(step)) for step in (1, 2, 3)]


class TestDream:
    result = Dream(
        context=3,
        truth=np.zeros((4, 2, 40, 40, 3), np.uint8),
        imagined=np.full((4, 2, 40, 40, 3), 51, np.uint8),
        reconstruction_mse=0.0,
        generation_mse=np.zeros(2),
        reward_true=np.array([1, 0, 1, 0], np.float32),
        reward_inferred=np.array([0.9, 0.1, 0.6, 0.4], np.float32),
        reward_imagined=np.array([0.9, 0.9, 0.1, 0.4], np.float32),
    )

    def test_accuracies_count_the_right_side_of_a_half(self) -> None:
        assert self.result.inference_accuracy == 1.0
        assert self.result.imagination_accuracy == 0.5

    def test_errors_are_summed_over_a_frame(self) -> None:
        error = squared_error(self.result.truth, self.result.imagined)
        np.testing.assert_allclose(error, np.full((4, 2), 4800 * 0.04), rtol=1e-6)

    def test_strips_are_drawn_truth_over_imagination(self, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        path = save_strips(strip(self.result, 2), tmp_path / "out", scale=1, gap=2)
        drawn = np.asarray(image.open(path))
        assert drawn.shape == (2 * (84 + 4), 84, 3)
        assert (drawn[:40, :40] == 0).all()
        assert (drawn[42:82, :40] == 51).all()
        with np.load(tmp_path / "out" / "strips.npz") as arrays:
            assert arrays["strip_step"].tolist() == [3, 4]
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="is a file"):
            save_strips(strip(self.result), tmp_path / "file")


def smoke(group: str, row: str) -> RunConfig:
    return load_recipe("demo-smoke").pick(row, group)


@pytest.mark.parametrize(("group", "row"), [("recall", "mamba2+hax"), ("world", "hax"), ("world", "gru")])
def test_real_rows_stopped_half_way_end_in_the_same_bits(group: str, row: str, tmp_path: Path) -> None:
    run = smoke(group, row)
    train(run, tmp_path / "whole")
    taken = iter([False, False, True])
    with pytest.raises(StoppedError):
        train(run, tmp_path / "parts", stop=lambda: next(taken, False))
    resumed = train(run, tmp_path / "parts")
    assert resumed["steps"] == run.train.steps
    models = [load_trained(tmp_path / name)[2].state_dict() for name in ("whole", "parts")]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_world_run_imagines_on_request(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    train(smoke("world", "s5"), tmp_path / "run")
    path = imagine_run(tmp_path / "run", tmp_path / "out", episodes=2, seed=1)
    assert path.is_file()
    with np.load(tmp_path / "out" / "strips.npz") as arrays:
        assert arrays["strip_truth"].shape == (2, 6, 40, 40, 3)
    with pytest.raises(ConfigError, match=r"must be in 1\.\.8"):
        imagine_run(tmp_path / "run", tmp_path / "out", episodes=9)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_the_journey_through_json(name: str) -> None:
    faceoff = load_recipe(name)
    assert from_dict(FaceOff, to_dict(faceoff)) == faceoff
    assert dumps(from_dict(FaceOff, to_dict(faceoff))) == dumps(faceoff)


def test_demo_rows_differ_in_the_backbone_only() -> None:
    """Within a group the same task, training and depth: what is compared is the layer (and, for 2x, the width)."""
    for group in ("recall", "world"):
        rows = [run for run in load_recipe("demo").runs if run.group == group]
        assert len(rows) >= 4
        first = rows[0]
        for run in rows:
            assert run.train == first.train
            backbone = run.problem.backbone
            assert len(backbone.layers) == len(first.problem.backbone.layers)
            assert replace(run.problem, backbone=first.problem.backbone) == first.problem
            if run.row != "mamba2-2x":
                assert backbone.d_model == first.problem.backbone.d_model
