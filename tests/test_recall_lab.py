"""The recall recipes hold the rows they promise, equal where they claim to be equal, and the published sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recollect.core.seeding import Streams
from recollect.layers.hax import HAX
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.ops.patterns import Dilated, Full, KeySelection, Lsh, Sink, Window, key_budget
from recollect.recipes import load_recipe
from recollect.tasks.joint_recall import JointRecall
from recollect.train.curriculum import ranges_at
from recollect.train.recall import RecallConfig
from recollect.train.run import RunConfig

BRANCHES = {
    "dilated": {Dilated},
    "window": {Window},
    "window+dilated": {Window, Dilated},
    "sink": {Window, Sink},
    "lsh": {Lsh},
    "ks": {KeySelection},
    "hax": {Lsh, KeySelection},
    "full": {Full},
}
EVERY_ROW = {
    *(f"{mixer}{end}" for mixer in ("mamba", "mamba2") for end in ("", "-2x", *(f"+{b}" for b in BRANCHES))),
    *("mamba2+hax-published", "gated_deltanet", "gated_deltanet+hax", "samba", "conv+attention"),
}
SIZES = {"recall-mini": (32, 8), "recall-published": (64, 16)}


def rows(recipe: str) -> dict[str, RunConfig]:
    return {run.row: run for run in load_recipe(recipe).runs}


def problem_of(run: RunConfig) -> RecallConfig:
    assert isinstance(run.problem, RecallConfig)
    return run.problem


def n_params(problem: RecallConfig) -> int:
    return sum(p.numel() for p in problem.build().build_model().parameters())


@pytest.mark.parametrize("recipe", SIZES)
def test_every_row_is_there_and_differs_in_its_layers_alone(recipe: str) -> None:
    found = rows(recipe)
    assert set(found) == EVERY_ROW
    first = problem_of(found["mamba2"])
    for name, run in found.items():
        problem = problem_of(run)
        assert replace(problem, backbone=first.backbone) == first, name
        assert run.train == found["mamba2"].train
        assert problem.backbone.d_model == (128 if name.endswith("-2x") else 64), name
        mixers = [layer for layer in problem.backbone.layers if layer.kind not in ("mlp", "short_conv")]
        assert len(mixers) == (4 if name == "samba" else 2), name


@pytest.mark.parametrize("recipe", SIZES)
def test_branches_read_what_their_names_say_within_one_budget(recipe: str) -> None:
    budget, largest = SIZES[recipe]
    length = 1 + 2 * largest * (2 * largest + 1)
    for name, run in rows(recipe).items():
        for layer in problem_of(run).backbone.layers:
            if not isinstance(layer, HAX.Config):
                continue
            branch = name.split("+", 1)[1].removesuffix("-published")
            assert {type(p) for p in layer.patterns} == BRANCHES[branch], name
            assert key_budget(layer.union) == (None if branch == "full" else budget), name
            for pattern in layer.patterns:
                if isinstance(pattern, Dilated):
                    reach = pattern.n_keys * pattern.stride
                    assert length - pattern.stride - pattern.n_keys < reach <= length, "the whole sample, not more"
            learned = branch in ("lsh", "ks", "hax") and not name.endswith("published")
            assert bool(layer.explore) == learned, name
            assert (layer.planes == "projected") == (learned and branch != "ks"), name


def test_the_published_scale_has_the_papers_sizes() -> None:
    """Parameters are those of the released configs, but for a learned scale; d_key, Mamba's state there, is 16 here."""
    found = rows("recall-published")
    counts = {name: n_params(problem_of(run)) for name, run in found.items()}
    assert (counts["mamba"], counts["mamba-2x"], counts["mamba+window"]) == (73_920, 246_144, 82_368 + 2)
    assert (counts["mamba2"], counts["mamba2-2x"], counts["mamba2+hax-published"]) == (67_184, 231_984, 100_594)
    task = problem_of(found["mamba2"]).task.build()
    assert isinstance(task, JointRecall)
    assert (len(task.cells()), task.max_length, task.vocab_size) == (144, 1057, 100)
    assert (task.first_key, task.first_context) == (26, 42)


def test_states_of_the_mixers_are_of_one_size() -> None:
    """Floats of recurrent memory per layer, without the convolution's window."""
    states = {
        "mamba2": lambda m: m.n_heads * m.d_head * m.d_state,
        "gated_deltanet": lambda m: m.n_heads * m.d_head * m.d_value,
        "mamba": lambda m: m.expand * m.d_model * m.d_state,
    }
    found = rows("recall-mini")
    floats = {n: size(problem_of(found[n]).backbone.layers[0]) for n, size in states.items()}
    assert set(floats.values()) == {512}


@pytest.mark.parametrize("recipe", ["recall-micro", "recall-mini", "recall-published"])
def test_curricula_end_in_the_tasks_own_sizes(recipe: str) -> None:
    run = load_recipe(recipe).runs[0]
    problem = problem_of(run)
    largest = problem.task.build().cells()[-1]
    assert ranges_at(problem.curriculum, 1, largest) == ((2, 3), (2, 3))
    end = problem.curriculum[-1].until_step
    assert end < run.train.steps
    assert ranges_at(problem.curriculum, end, largest) == tuple((2, n) for n in largest)
    assert ranges_at(problem.curriculum, end + 1, largest) is None


@pytest.mark.parametrize("name", sorted(EVERY_ROW))
def test_every_row_takes_a_training_step(name: str) -> None:
    """On the smallest tables: finite, and every parameter is reached by the losses together."""
    problem = replace(problem_of(rows("recall-mini")[name]), batch_size=2)
    built = problem.build()
    torch.manual_seed(0)
    model = built.build_model().train()
    assert isinstance(model, LanguageModel)
    streams = Streams(0)
    batch = built.batch(1, streams, torch.device("cpu"))
    loss, _ = built.loss(model, batch, streams.torch("sample", 1, device="cpu"))
    loss.backward()
    assert loss.isfinite()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert isinstance(problem.backbone, Backbone.Config)
