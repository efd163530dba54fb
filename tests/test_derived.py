"""What follows from parameters is kept between steps, and never when it no longer follows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from recollect.core.derived import Derived
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

        return self.kept.of(self, key, make)


def test_made_once_while_nothing_changes() -> None:
    module = Doubled()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(), torch.full((3,), 2.0))
    assert module.made == 1


def test_made_anew_where_gradients_are_recorded() -> None:
    module = Doubled()
    with torch.no_grad():
        module()
    module().sum().backward()
    module().sum().backward()
    assert module.made == 3
    assert module.weight.grad is not None
    assert module.weight.grad[0] == 4


@torch.no_grad()
def test_every_way_of_changing_parameters_is_noticed() -> None:
    module = Doubled()
    module()
    module.weight.add_(1)
    assert module()[0] == 4
    module.load_state_dict({"weight": torch.zeros(3)})
    assert module()[0] == 0
    module.weight.data = torch.full((3,), 5.0)
    assert module()[0] == 10
    module.weight = nn.Parameter(torch.full((3,), 7.0))
    assert module()[0] == 14
    assert module.double()().dtype == torch.float64
    assert torch.func.functional_call(module, {"weight": torch.ones(3)})[0] == 2
    assert module("other key")[0] == 14


def test_an_optimizer_step_is_noticed() -> None:
    module = Doubled()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=0.0)
    with torch.no_grad():
        before = module()
    module().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(module(), 2 * module.weight)
        assert not torch.equal(module(), before)


def test_copies_begin_without_it() -> None:
    module = Doubled()
    with torch.no_grad():
        module()
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301 (its own bytes)
            copied.weight.mul_(3)
            assert copied()[0] == 6
        assert module()[0] == 2


@pytest.mark.parametrize("config", [S4.Config.tiny(), S4D.Config.tiny(), S5.Config.tiny()], ids=lambda c: c.kind)
def test_layers_step_alike_with_and_without(config: S4.Config | S4D.Config | S5.Config) -> None:
    torch.manual_seed(0)
    layer = config.build()
    x = torch.randn(2, config.d_model)

    def stepped() -> Tensor:
        return layer.step(x, layer.init_state(2))[0]

    for _ in range(2):
        recorded = stepped()
        with torch.no_grad():
            assert torch.equal(stepped(), recorded.detach())
            assert torch.equal(stepped(), recorded.detach())
            for parameter in layer.parameters():
                parameter.mul_(0.9)
