"""What follows from parameters is made once where they are promised to stay, and anew everywhere else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from recollect.core.derived import Derived, unchanging
from recollect.layers.s4 import S4
from recollect.layers.s4d import S4D
from recollect.layers.s5 import S5


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.kept: Derived[Tensor] = Derived()
        self.made = 0

    def forward(self, key: str = "") -> Tensor:
        def make() -> Tensor:
            self.made += 1
            return 2 * self.weight

        return self.kept.of(key, make)


@torch.no_grad()
def test_made_once_for_a_key_inside_and_every_time_outside() -> None:
    module = Doubled()
    with unchanging():
        assert torch.equal(module(), torch.full((3,), 2.0))
        with unchanging():
            module()
        module()
        assert module.made == 1
        module("other")
        assert module.made == 2
    module()
    module()
    assert module.made == 4


def test_made_anew_where_gradients_are_recorded() -> None:
    module = Doubled()
    with unchanging():
        for _ in range(2):
            module().sum().backward()
    assert module.made == 2
    assert module.weight.grad is not None
    assert module.weight.grad[0] == 4


def test_what_an_earlier_scope_kept_is_forgotten() -> None:
    """A fused optimizer leaves no trace on what it writes to, which is why the promise has to be made."""
    module = Doubled()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=0.0, fused=True)
    with torch.no_grad(), unchanging():
        before = module()
    module().sum().backward()
    optimizer.step()
    with torch.no_grad(), unchanging():
        assert torch.equal(module(), 2 * module.weight)
        assert not torch.equal(module(), before)


@torch.no_grad()
def test_the_promise_ends_with_an_error_inside() -> None:
    module = Doubled()

    def fails() -> None:
        with unchanging():
            module()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    module()
    assert module.made == 2


@torch.no_grad()
def test_copies_begin_without_it() -> None:
    module = Doubled()
    with unchanging():
        module()
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301 (its own bytes)
            copied.weight.mul_(3)
            assert copied()[0] == 6
        assert module()[0] == 2


@pytest.mark.parametrize("config", [S4.Config.tiny(), S4D.Config.tiny(), S5.Config.tiny()], ids=lambda c: c.kind)
def test_layers_step_alike_inside_and_outside(config: S4.Config | S4D.Config | S5.Config) -> None:
    torch.manual_seed(0)
    layer = config.build()
    x = torch.randn(2, config.d_model)

    def stepped() -> Tensor:
        return layer.step(x, layer.init_state(2))[0]

    for _ in range(2):
        recorded = stepped()
        with torch.no_grad(), unchanging():
            assert torch.equal(stepped(), recorded.detach())
            assert torch.equal(stepped(), recorded.detach())
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(0.9)
