"""GRU and LSTM: both executions against their equations and against PyTorch's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recollect.core.errors import ConfigError
from recollect.layers.gru import GRU
from recollect.layers.lstm import LSTM
from recollect.ops import dispatch, recurrent
from recollect.ops.recurrent import CellWeights, gru, gru_reference, lstm, lstm_reference

OPS = {"gru": (gru, gru_reference, 3, 1), "lstm": (lstm, lstm_reference, 4, 2)}
TORCH = {"gru": nn.GRU, "lstm": nn.LSTM}
LAYERS: dict[str, Any] = {"gru": GRU, "lstm": LSTM}

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def inputs(name: str, length: int, batch: int, d_inner: int) -> tuple[Tensor, CellWeights, list[Tensor], Tensor]:
    *_, n_gates, n_states = OPS[name]
    module = TORCH[name](5, d_inner, batch_first=True).double()
    weights = CellWeights(*(p.detach() for p in module.parameters()))
    assert weights.w_hh.shape == (n_gates * d_inner, d_inner)
    reset = torch.rand(batch, length) < 0.1
    reset[0, :2] = True
    states = [torch.randn(batch, d_inner, dtype=torch.float64) for _ in range(n_states)]
    return torch.randn(batch, length, 5, dtype=torch.float64), weights, states, reset


def run(op: Any, u: Tensor, weights: CellWeights, states: list[Tensor], reset: Tensor | None) -> list[Tensor]:
    """Outputs, and gradients of a random function of all of them by inputs, states and weights."""
    u = u.clone().requires_grad_()
    states = [state.clone().requires_grad_() for state in states]
    weights = CellWeights(*(w.clone().requires_grad_() for w in weights))
    outputs = op(u, weights, *states, reset=reset)
    generator = torch.Generator().manual_seed(3)
    loss = sum((out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(loss, [u, *states, *weights])]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("name", OPS)
def test_cells_equal_their_reference(name: str, length: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    # Six rows are a group of four and two single ones; seven columns four and three.
    u, weights, states, reset = inputs(name, length, 2 if length == 1000 else 6, 7)
    if length == 1000 and kernels == "torch":
        reset &= torch.rand(1000) < 0.05
    for case in (None, reset, torch.zeros_like(reset)):
        actual, expected = (run(op, u, weights, states, case) for op in OPS[name][:2])
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, i=i: f"{i}: {text}")


@pytest.mark.parametrize("name", OPS)
def test_without_resets_cells_equal_the_layers_of_pytorch(name: str) -> None:
    module = TORCH[name](5, 8, batch_first=True).double()
    u = torch.randn(4, 50, 5, dtype=torch.float64)
    zeros = [torch.zeros(4, 8, dtype=torch.float64)] * OPS[name][3]
    weights = CellWeights(*module.parameters())
    torch.testing.assert_close(OPS[name][0](u, weights, *zeros)[0], module(u)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPS)
def test_any_number_of_threads_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "FEW_CUTS", 10**9)
    u, weights, states, reset = inputs(name, 30, 11, 6)
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(OPS[name][0](u, weights, *states, reset=reset))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_half_precision_is_computed_in_single(name: str) -> None:
    layer = LAYERS[name](LAYERS[name].Config(8))
    x, reset = torch.randn(2, 65, 8), torch.rand(2, 65) < 0.1
    expected = layer(x, reset=reset)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, reset=reset)
        layer.step(x[:, 0], out.state)
    torch.testing.assert_close(out.y.float(), expected.y, rtol=0.05, atol=0.05)
    half = layer.bfloat16()(x.bfloat16(), reset=reset)
    assert half.y.dtype == half.state.h.dtype == torch.bfloat16
    torch.testing.assert_close(half.y.float(), expected.y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", OPS)
def test_forward_stays_near_step_over_4000_positions_in_single_precision(name: str) -> None:
    layer = LAYERS[name](LAYERS[name].Config(8)).eval()
    x, reset = torch.randn(2, 4000, 8), torch.rand(2, 4000) < 0.02
    state, outputs = layer.init_state(2), []
    with torch.no_grad():
        whole = layer(x, reset=reset)
        for x_t, reset_t in zip(x.unbind(1), reset.unbind(1), strict=True):
            y_t, state = layer.step(x_t, state, reset=reset_t)
            outputs.append(y_t)
    assert (whole.y - torch.stack(outputs, 1)).abs().max() < 1e-4
    assert (whole.state.h - state.h).abs().max() < 1e-4


@pytest.mark.parametrize("name", OPS)
def test_configs_that_cannot_be_are_named(name: str) -> None:
    for d_inner in (0, -3):
        with pytest.raises(ConfigError, match=f"^{name}: d_inner must be at least 1, got {d_inner}$"):
            LAYERS[name].Config(8, d_inner=d_inner)
