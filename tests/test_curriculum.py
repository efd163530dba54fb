"""How recall is taught: batches of one size, padded or packed; small sizes first; dense attention before sparse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recollect.core.config import from_dict, override, to_dict
from recollect.core.errors import ConfigError
from recollect.core.seeding import Streams
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2
from recollect.layers.sparse import SparseAttention, set_dense
from recollect.models.backbone import Backbone
from recollect.ops.patterns import Full, KeySelection, Lsh, Window
from recollect.tasks import JointRecall
from recollect.train.batches import digest
from recollect.train.curriculum import Stage, ranges_at
from recollect.train.loop import StoppedError, load_trained, train
from recollect.train.recall import Recall, RecallBatch, RecallConfig
from recollect.train.run import RunConfig, TrainConfig
from recollect.train.token_batches import TokenBatches

TASK = JointRecall.Config(n_contexts=(2, 4), n_keys=(3, 5), n_values=5)
CPU = torch.device("cpu")
SPARSE = HAX.Config(8, mixer=GRU.Config(8), patterns=(Lsh(4, n_bits=2), KeySelection(3)), d_key=4)
STAGES = (Stage(3, ((1, 2), (1, 1))), Stage(10, ((1, 2), (2, 3)), ramp=True))


def config(**changes: Any) -> RecallConfig:
    plain = RecallConfig(TASK, Backbone.Config(8, layers=(GRU.Config(8), SPARSE)), batch_size=6, valid_samples=2)
    return replace(plain, **changes)


def batch_of(problem: Recall, step: int) -> RecallBatch:
    return problem.batch(step, Streams(3), CPU)


class TestBatching:
    def test_one_size_is_what_it_was(self) -> None:
        batch = batch_of(config().build(), 4)
        drawn = JointRecall(TASK).batch(Streams(3).numpy("data", "train", 4), 6, split="train")
        assert torch.equal(batch.tokens, torch.from_numpy(drawn.tokens))
        assert (batch.reset, batch.filling, batch.dense) == (None, 1.0, False)

    @pytest.mark.parametrize("batching", ["one-size", "padded", "packed"])
    def test_batches_are_addressed_by_step(self, batching: Any) -> None:
        problem = config(batching=batching, curriculum=STAGES).build()
        one = digest(batch_of(problem, 7))
        assert digest(batch_of(problem, 9)) != one
        assert digest(batch_of(problem, 7)) == one

    def test_packed_rows_keep_their_shape(self) -> None:
        """Rows for ``batch_size`` samples of average size, as long as the longest; at every stage."""
        problem = config(batching="packed", batch_size=20, curriculum=STAGES).build()
        task = JointRecall(TASK)
        mean = np.mean([task.length(cell) for cell in task.cells()])
        shape = (round(20 * mean / task.max_length), task.max_length)
        asked = [batch_of(problem, step).mask.sum() for step in (1, 5, 10, 11, 20)]
        assert all(batch_of(problem, step).tokens.shape == shape for step in (1, 5, 10, 11, 20))
        assert min(asked) > 0.4 * max(asked)  # small samples come in larger numbers
        batch = batch_of(problem, 20)
        assert batch.reset is not None
        assert 0.8 < batch.filling <= 1
        begins = batch.tokens == 1  # bos, once a sample
        assert batch.reset[begins].all()
        padding = int((~begins & batch.reset).sum())
        assert batch.filling == pytest.approx(1 - padding / batch.tokens.numel())

    def test_explicit_rows(self) -> None:
        batch = batch_of(config(batching="packed", rows=3, row_length=200).build(), 1)
        assert batch.tokens.shape == (3, 200)
        assert batch_of(config(batching="padded", row_length=100).build(), 1).tokens.shape == (6, 100)

    def test_padded_rows_hold_one_sample_each(self) -> None:
        batch = batch_of(config(batching="padded", batch_size=30).build(), 1)
        assert batch.reset is not None
        assert batch.tokens.shape == (30, JointRecall(TASK).max_length)
        lengths = (~batch.reset).sum(1) + 1
        assert batch.filling == pytest.approx(float(lengths.sum()) / batch.tokens.numel())
        assert len(lengths.unique()) > 3
        assert ((batch.tokens == 1).sum(1) == 1).all()

    def test_the_filling_is_logged_and_every_batching_trains(self) -> None:
        for batching in ("one-size", "padded", "packed"):
            problem = config(batching=batching).build()  # type: ignore[arg-type]
            model = problem.build_model().train()
            loss, numbers = problem.loss(model, batch_of(problem, 1), torch.Generator())
            loss.backward()
            assert numbers["filling"] == batch_of(problem, 1).filling
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


class TestCurriculum:
    def test_ranges_by_step(self) -> None:
        at = {step: ranges_at(STAGES, step, (4, 5)) for step in (1, 3, 4, 7, 10, 11)}
        assert at[1] == at[3] == ((1, 2), (1, 1))
        assert at[4] == ((1, 2), (2, 3))
        assert at[7] == ((1, 3), (2, 4))
        assert at[10] == ((1, 4), (2, 5))
        assert at[11] is None
        assert ranges_at((), 1, (4, 5)) is None

    def test_a_ramp_ends_where_the_next_stage_begins_and_never_turns_over(self) -> None:
        up_and_down = (Stage(5, ((2, 3),), ramp=True), Stage(6, ((1, 9),)), Stage(9, ((4, 8),), ramp=True))
        assert [ranges_at(up_and_down, step, (2,)) for step in (1, 5, 6)] == [((2, 3),), ((2, 9),), ((1, 9),)]
        assert ranges_at(up_and_down, 9, (2,)) == ((4, 4),)
        assert ranges_at((Stage(1, ((2, 3),), ramp=True),), 1, (9,)) == ((2, 3),)

    @pytest.mark.parametrize("batching", ["one-size", "padded", "packed"])
    def test_sizes_come_from_the_ranges_and_then_from_the_task(self, batching: Any) -> None:
        batches = TokenBatches(JointRecall(TASK), 40, batching, curriculum=STAGES)

        def seen(step: int) -> set[tuple[int, ...]]:
            sizes: set[tuple[int, ...]] = set()
            for seed in range(60):
                rng = np.random.default_rng(seed)
                ranges = ranges_at(STAGES, step, (4, 5))
                sizes |= set(batches._sizes(rng, 40, ranges))
            return sizes

        assert seen(2) == {(1, 1), (2, 1)}
        assert seen(10) == {(c, k) for c in (1, 2, 3, 4) for k in (2, 3, 4, 5)}
        assert seen(11) == set(JointRecall(TASK).cells())
        longest = {1: 1 + 2 * 2 * 3, 10: 1 + 2 * 4 * 11}
        for step, most in longest.items():
            drawn = batches.draw(step, np.random.default_rng(0))
            starts = drawn.tokens == 1
            assert starts.any(1).all()
            if batching != "packed":
                assert drawn.tokens.shape[1] <= most
            assert drawn.mask.any(1).all()

    def test_sizes_between_the_task_and_its_id_space(self) -> None:
        wide = replace(TASK, max_contexts=6)
        problem = config(task=wide, batching="packed", curriculum=(Stage(2, ((5, 6), (5, 5))),)).build()
        assert batch_of(problem, 1).tokens.shape[1] == 1 + 2 * 6 * 11
        assert batch_of(problem, 3).tokens.shape[1] == 1 + 2 * 6 * 11

    def test_it_is_written_on_the_command_line(self) -> None:
        text = '[{"until_step": 20, "sizes": [[1, 2], [1, 3]], "ramp": true}]'
        made = override(config(), [f"curriculum={text}", "batching=packed"])
        assert made.curriculum == (Stage(20, ((1, 2), (1, 3)), ramp=True),)
        assert from_dict(RecallConfig, json.loads(json.dumps(to_dict(made)))) == made

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"batching": "mixed"}, "batching must be one of one-size, padded, packed, got 'mixed'"),
            ({"rows": 3}, "rows is for batching=packed, not one-size"),
            ({"rows": 0, "batching": "packed"}, "rows must be at least 1"),
            ({"row_length": 90}, "row_length is for batching=packed or padded"),
            ({"row_length": 80, "batching": "packed"}, "row_length must be at least 89, the longest sample; got 80"),
            ({"row_length": 80, "batching": "padded"}, "row_length must be at least 89"),
            ({"curriculum": (Stage(5, ((1, 2),)),)}, "a range for contexts and keys, got 1"),
            ({"curriculum": (Stage(5, ((1, 2), (1, 9))),)}, r"size \(2, 9\) is outside"),
            ({"curriculum": (STAGES[1], STAGES[0])}, "until_step must grow from stage to stage, got 10, 3"),
            ({"dense_steps": -1}, "dense_steps must not be negative"),
            (
                {"dense_steps": 1, "backbone": Backbone.Config(8, layers=(GRU.Config(8),))},
                "dense_steps needs a layer with sparse attention",
            ),
        ],
    )
    def test_what_cannot_be_taught_is_an_error_of_one_line(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message) as error:
            config(**changes).build()
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("wrong", [(0, ((1, 2),)), (4, ((0, 2),)), (4, ((3, 2),))])
    def test_impossible_stages(self, wrong: Any) -> None:
        with pytest.raises(ConfigError, match="curriculum: "):
            Stage(*wrong)


PATTERNS = (Lsh(4, n_bits=2), KeySelection(3), Window(2))


class TestDense:
    @pytest.mark.parametrize("selection", ["ranking", "gate+kl"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_dense_equals_a_full_layer_of_the_same_weights(self, selection: Any, packed: bool) -> None:
        sparse = HAX(HAX.Config(8, mixer=Mamba2.Config.tiny(), patterns=PATTERNS, d_key=4, selection=selection))
        sparse = sparse.double()
        x = torch.randn(2, 50, 8, dtype=torch.float64)
        reset = (torch.rand(2, 50) < 0.1) if packed else None
        before = sparse.train()(x, reset=reset).y
        set_dense(sparse, True)
        y = sparse(x, reset=reset)

        if selection == "ranking":
            full = HAX(HAX.Config(8, mixer=Mamba2.Config.tiny(), patterns=(Full(),), d_key=4)).double()
            full.load_state_dict(sparse.state_dict(), strict=False)
        else:  # a gate is part of attention: scores weigh the keys that are read, dense or not
            full = HAX(replace(sparse.config, patterns=(KeySelection(50),), selection="gate")).double()
            full.load_state_dict(sparse.state_dict(), strict=False)
        torch.testing.assert_close(y.y, full(x, reset=reset).y, rtol=1e-9, atol=1e-9)
        assert (y.y - before).abs().max() > 1e-3

        (y.y.square().sum() + y.aux["selection"]).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in sparse.attention.scorer.parameters())

        set_dense(sparse, False)
        assert torch.equal(sparse(x, reset=reset).y, before)

    def test_evaluation_reads_the_patterns(self) -> None:
        layer = SparseAttention(SparseAttention.Config(8, d_key=4, patterns=PATTERNS)).eval()
        x = torch.randn(1, 40, 8)
        before = layer(x)
        set_dense(layer, True)
        after = layer(x)
        assert torch.equal(before.y, after.y)
        assert before.state.memory.k.shape == after.state.memory.k.shape == layer.init_state(1).memory.k.shape

    def test_a_dense_state_goes_on(self) -> None:
        """Split and fold hold while dense too."""
        layer = SparseAttention(SparseAttention.Config(8, d_key=4, patterns=PATTERNS)).double().train()
        set_dense(layer, True)
        x = torch.randn(2, 9, 8, dtype=torch.float64)
        whole, state, outputs = layer(x).y, layer.init_state(2, dtype=torch.float64), []
        for x_BD in x.unbind(1):
            y, state = layer.step(x_BD, state)
            outputs.append(y)
        torch.testing.assert_close(torch.stack(outputs, 1), whole)
        first = layer(x[:, :4])
        torch.testing.assert_close(layer(x[:, 4:], first.state).y, whole[:, 4:])

    def test_the_step_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = config(dense_steps=2).build()
        model = problem.build_model().train()
        unions: list[Any] = []
        read = SparseAttention._attend

        def spy(layer: SparseAttention, *args: Any, **kwargs: Any) -> Any:
            unions.append(layer.union)
            return read(layer, *args, **kwargs)

        monkeypatch.setattr(SparseAttention, "_attend", spy)
        for step in (1, 3, 2):
            problem.loss(model, batch_of(problem, step), torch.Generator())
            problem.evaluate(model.eval(), Streams(0), final=False)
            model.train()
        cells = len(JointRecall(TASK).cells())
        own = [SPARSE.patterns] * cells
        assert unions == [(Full(),), *own, SPARSE.patterns, *own, (Full(),), *own]


@pytest.mark.parametrize("batching", ["one-size", "packed"])
@pytest.mark.parametrize("stop_after", [2, 5])
def test_runs_stopped_anywhere_end_in_the_same_bits(batching: Any, stop_after: int, tmp_path: Path) -> None:
    """In a stage, in a ramp, while dense and afterwards."""
    stages = (Stage(2, ((1, 2), (1, 2))), Stage(4, ((1, 2), (1, 2)), ramp=True))
    problem = config(batching=batching, curriculum=stages, dense_steps=3, test_samples=2)
    run = RunConfig("none", "recall", "row", 0, problem, TrainConfig(8, warmup_steps=2, log_every=1, eval_every=3))
    train(run, tmp_path / "whole")
    calls = iter(range(100))
    with pytest.raises(StoppedError):
        train(run, tmp_path / "parts", stop=lambda: next(calls) >= stop_after)
    train(run, tmp_path / "parts")
    weights: list[dict[str, Tensor]] = [load_trained(tmp_path / name)[2].state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
