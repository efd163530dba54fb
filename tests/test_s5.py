"""S5 against the dense continuous system it stands for, and its operation against its equation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from recollect.core.errors import ConfigError
from recollect.layers.s5 import S5, S5State
from recollect.ops import dispatch
from recollect.ops.hippo import legs_normal
from recollect.ops.mimo_ssm import mimo_ssm, mimo_ssm_reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def dense_outputs(layer: S5, u_LD: np.ndarray, starts: dict[int, np.ndarray]) -> np.ndarray:
    """y of the system with both of every conjugate pair, discretised as full matrices; ``starts`` by position."""
    A_half = -np.exp(layer.log_A_real.detach().numpy()) + 1j * layer.A_imag.detach().numpy()
    B_half, C_half = (torch.view_as_complex(t.detach()).numpy() for t in (layer.B, layer.C))
    dt = np.tile(np.exp(layer.log_dt.detach().numpy()), 2)
    # A step size of its own for every state scales the rows of the system.
    A = np.diag(dt * np.concatenate([A_half, A_half.conj()]))
    B = dt[:, None] * np.concatenate([B_half, B_half.conj()])
    C = np.concatenate([C_half, C_half.conj()], 1)
    size, width = B.shape
    if layer.discretisation == "zoh":
        whole = scipy.linalg.expm(np.block([[A, B], [np.zeros((width, size + width))]]))
        A_bar, B_bar = whole[:size, :size], whole[:size, size:]
    else:
        less = np.eye(size) - A / 2
        A_bar, B_bar = scipy.linalg.solve(less, np.eye(size) + A / 2), scipy.linalg.solve(less, B)
    h, outputs = np.zeros(size, complex), []
    for t, u_D in enumerate(u_LD):
        if t in starts:
            re, im = np.split(starts[t], 2)
            h = np.concatenate([re + 1j * im, re - 1j * im])
        h = A_bar @ h + B_bar @ u_D
        y = C @ h
        assert abs(y.imag).max() < 1e-9
        outputs.append(y.real + layer.D.detach().numpy() * u_D)
    return np.stack(outputs)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("n_blocks", [1, 2])
@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
def test_s5_equals_the_dense_discretised_system(discretisation: str, n_blocks: int, learned: bool) -> None:
    config = S5.Config(5, d_state=12, n_blocks=n_blocks, discretisation=discretisation, learned_init=learned)  # pyright: ignore[reportArgumentType]
    layer = S5(config).double()
    if layer.h_init is not None:
        torch.nn.init.normal_(layer.h_init)
    fresh = layer.init_state(1).h[0].detach().numpy()
    x, incoming = torch.randn(2, 40, 5, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[0, [3, 20, 21]] = True
    seen: list[Tensor] = []
    # The core's own output, before the GELU: what _emit is given.
    emit = layer._emit
    layer._emit = lambda y, x, branch: (seen.append(y), emit(y, x, branch))[1]  # type: ignore[method-assign]
    with torch.no_grad():
        layer(x, S5State(incoming), reset=reset)
        layer(x)
    for row, starts in enumerate(
        ({0: incoming[0].numpy()} | dict.fromkeys((3, 20, 21), fresh), {0: incoming[1].numpy()})
    ):
        np.testing.assert_allclose(seen[0][row].numpy(), dense_outputs(layer, x[row].numpy(), starts), atol=1e-9)
    np.testing.assert_allclose(seen[1][0].numpy(), dense_outputs(layer, x[0].numpy(), {0: fresh}), atol=1e-9)


def test_the_initial_eigenvalues_are_those_of_the_normal_part_of_hippo_legs() -> None:
    size = 8
    n = np.arange(size)
    hippo = np.where(n[:, None] > n, -np.sqrt(2 * n[:, None] + 1) * np.sqrt(2 * n + 1), 0) - np.diag(n + 1)
    low_rank = np.sqrt(n + 0.5)
    normal = hippo + np.outer(low_rank, low_rank)
    np.testing.assert_allclose(normal @ normal.T, normal.T @ normal, atol=1e-9)
    values, vectors = legs_normal(size)
    np.testing.assert_allclose(normal @ vectors.numpy(), vectors.numpy() * values.numpy(), atol=1e-9)
    assert (values.imag > 0).all()


def inputs(length: int) -> dict[str, Tensor]:
    def random(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64)

    angle = random(3)
    reset = torch.rand(2, length) < 0.05
    reset[0, :2] = True
    return {
        "u_BLD": random(2, length, 4),
        "a_2N": 0.9 * torch.stack([angle.cos(), angle.sin()]),
        "inward_RD": random(6, 4),
        "outward_DR": random(4, 6),
        "skip_D": random(4),
        "h_init": random(2, 6),
        "h_reset": random(6),
        "reset": reset,
    }


def run(op: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if v.dtype != torch.bool}
    y, last = op(**given | leaves)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    grads = torch.autograd.grad((y * weight).sum() + (last * last).sum(), list(leaves.values()), allow_unused=True)
    return {"y": y, "last": last} | {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True) if g is not None}


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_mimo_ssm_equals_reference(length: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    given = inputs(length)
    for case in (given, {k: v for k, v in given.items() if "reset" not in k}, given | {"reset": ~given["reset"]}):
        actual, expected = run(mimo_ssm, case), run(mimo_ssm_reference, case)
        for name, value in expected.items():
            torch.testing.assert_close(
                actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_half_precision_is_computed_in_single() -> None:
    layer = S5(S5.Config(8, d_state=8, learned_init=True))
    x = torch.randn(2, 65, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.y.dtype == torch.bfloat16
    assert out.state.h.dtype == torch.float32
    torch.testing.assert_close(out.y.float(), layer(x).y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
def test_forward_stays_near_step_over_4000_positions_in_single_precision(discretisation: str) -> None:
    layer = S5(S5.Config(8, d_state=8, discretisation=discretisation, learned_init=True)).eval()  # pyright: ignore[reportArgumentType]
    x, state, outputs = torch.randn(2, 4000, 8), layer.init_state(2), []
    with torch.no_grad():
        whole = layer(x)
        for x_t in x.unbind(1):
            y_t, state = layer.step(x_t, state)
            outputs.append(y_t)
    assert (whole.y - torch.stack(outputs, 1)).abs().max() < 1e-4
    assert (whole.state.h - state.h).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 7}, "multiple of 2 \\* n_blocks = 2"),
        ({"d_state": 0}, "positive multiple"),
        ({"d_state": 12, "n_blocks": 4}, "n_blocks = 8"),
        ({"n_blocks": 0}, "n_blocks"),
        ({"dt_min": 0.0}, "0 < dt_min <= dt_max"),
        ({"dt_min": -0.1}, "0 < dt_min <= dt_max"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "0 < dt_min <= dt_max"),
        ({"discretisation": "euler"}, "'zoh' or 'bilinear', got 'euler'"),
        ({"d_model": 0}, "d_model must be at least 1"),
    ],
)
def test_configs_that_cannot_be_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        S5.Config(**{"d_model": 8} | options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
