"""What the recipes train: recall and world problems, their scores, and real rows that stop and resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recollect.core.config import dumps, from_dict, to_dict
from recollect.core.seeding import Streams
from recollect.core.state import nbytes
from recollect.core.types import Aux
from recollect.eval.recall import recall_scores
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.ops.patterns import KeySelection, Lsh
from recollect.recipes import RECIPES, load_recipe
from recollect.tasks import JointRecall
from recollect.tasks.batch import TokenBatch
from recollect.tasks.oracles import ORACLES
from recollect.train.batches import digest
from recollect.train.loop import StoppedError, load_trained, train
from recollect.train.recall import RecallConfig
from recollect.train.run import FaceOff, RunConfig

TASK = JointRecall.Config(n_contexts=(2, 3), n_keys=(2, 4), n_values=5)


@pytest.fixture(autouse=True)
def _data_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path_factory.getbasetemp() / "episodes"))


def recall_config() -> RecallConfig:
    layer = HAX.Config(8, mixer=GRU.Config(8), patterns=(Lsh(4, n_bits=2), KeySelection(3)), d_key=4)
    return RecallConfig(TASK, Backbone.Config(8, layers=(GRU.Config(8), layer)), batch_size=3, valid_samples=2)


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
            own, other = (r.problem if group == "recall" else r.problem.dynamics for r in (run, first))
            assert len(own.backbone.layers) == len(other.backbone.layers)
            assert replace(own, backbone=other.backbone) == other
            if group == "world":
                assert replace(run.problem, dynamics=other) == first.problem
            if run.row != "mamba2-2x":
                assert own.backbone.d_model == other.backbone.d_model
