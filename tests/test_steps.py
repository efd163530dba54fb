"""Steps as recorded on a GPU, with a recording that runs anew: what is copied where, and what falls back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from recollect.core.state import leaves
from recollect.core.steps import Steps
from recollect.models import world_model
from recollect.models.vision import Tiles
from recollect.models.world_model import Batch, WorldModel
from small_worlds import DYNAMICS


class Count(NamedTuple):
    total: Tensor
    times: Tensor


def add(state: Any, inputs: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor], Count]:
    (x, more) = inputs
    assert x is not None
    total = state.total + x if more is None else state.total + x + more
    return (total,), Count(total, state.times + 1)


def again(run: Callable[[], None]) -> Callable[[], None]:
    """As a graph: it runs once before it is recorded, and writes to the same memory ever after."""
    run()
    return run


def begin() -> Count:
    return Count(torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_a_recorded_step_gives_what_the_step_gives_and_nothing_it_gave_changes() -> None:
    start = begin()
    steps = Steps(add, start, record=again)
    given = [torch.full((2,), float(i)) for i in range(1, 5)]
    outputs = [steps(x, None)[0] for x in given]
    assert [float(y[0]) for y in outputs] == [1.0, 3.0, 6.0, 10.0]
    assert steps.why == ""
    held = steps.state
    assert isinstance(held, Count)
    assert held.times.tolist() == [4, 4]
    steps(given[0], None)
    assert held.total.tolist() == [10.0, 10.0], "a state that was handed out stays"
    assert start.total.tolist() == [0.0, 0.0], "and so does the one it began with"
    assert [float(x[0]) for x in given] == [1.0, 2.0, 3.0, 4.0]


def test_parts_of_a_state_may_change_places() -> None:
    def swap(state: Any, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        assert inputs[0] is not None
        return state[0], (state[1], state[0])

    steps = Steps(swap, (torch.zeros(1), torch.ones(1)), record=again)
    assert [float(steps(torch.zeros(1))) for _ in range(4)] == [0.0, 1.0, 0.0, 1.0]


def test_steps_without_a_gpu_run_as_written() -> None:
    steps = Steps(add, begin())
    assert float(steps(torch.ones(2), torch.ones(2))[0][0]) == 2.0
    assert steps.why == "not on a GPU"


def test_a_state_that_grows_is_not_recorded() -> None:
    def grow(state: Any, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        assert inputs[0] is not None
        return inputs[0], torch.cat([state, inputs[0]])

    steps = Steps(grow, torch.zeros(0), record=again)
    for x in (torch.ones(1), 2 * torch.ones(1)):
        steps(x)
    assert steps.why == "the state changes its shape"
    assert isinstance(steps.state, Tensor)
    assert steps.state.tolist() == [1.0, 2.0]


def test_a_recording_that_fails_leaves_the_steps_as_they_were() -> None:
    def fails(run: Callable[[], None]) -> Callable[[], None]:
        run()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    steps = Steps(add, begin(), record=fails)
    assert [float(steps(torch.ones(2), None)[0][0]) for _ in range(3)] == [1.0, 2.0, 3.0]
    assert steps.why == "no graph could be recorded: operation not permitted when stream is capturing"


@pytest.mark.parametrize("kind", ["s5", "hax", "rssm", "transformer_xl", "full"])
def test_recorded_dreams_are_the_same_dreams(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = WorldModel(WorldModel.Config(3, DYNAMICS[kind], Tiles(n_codes=8, hidden=16), hidden=16)).eval()
    actions = torch.rand(2, 5, 3)
    first = torch.zeros(2, 4, dtype=torch.bool)
    first[:, 0] = True
    frames = torch.randint(8, (2, 4, 5, 5), dtype=torch.uint8)
    with torch.no_grad():
        seen = model.observe(Batch(frames, torch.rand(2, 4, 3), torch.zeros(2, 4), first, torch.zeros_like(first)))
    plain = model.imagine(seen.state, actions, generator=torch.Generator().manual_seed(3))
    made: list[Steps[Any]] = []
    monkeypatch.setattr(
        world_model, "Steps", lambda step, state: made.append(Steps(step, state, record=again)) or made[0]
    )
    other = model.imagine(seen.state, actions, generator=torch.Generator().manual_seed(3))
    assert made[0].why == ("the state changes its shape" if kind == "full" else "")
    for name in ("h", "z", "reward"):
        assert torch.equal(getattr(plain, name), getattr(other, name)), name
    for (_, one), (_, two) in zip(leaves(plain.state), leaves(other.state), strict=True):
        assert torch.equal(one, two)
