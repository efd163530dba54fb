"""S4: its kernel against the dense HiPPO system, its chunks against its recurrence, resets and single precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from recollect.core.errors import ConfigError
from recollect.layers.s4 import S4
from recollect.ops import dispatch
from recollect.ops.dplr import Discrete, discretise
from recollect.ops.hippo import legs, legs_dplr
from recollect.ops.s4_kernel import s4, s4_reference, s4_taps

LENGTHS = (1, 63, 64, 65, 1000)
WIDTH, SIZE = 3, 16

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def continuous(size: int = SIZE) -> dict[str, Tensor]:
    """HiPPO-LegS in the form S4 keeps, with three step sizes and random C."""
    start = legs_dplr(size)
    values, p, b = (t.expand(WIDTH, -1).clone() for t in (start.values, start.p, start.b))
    C = torch.complex(normal(WIDTH, size // 2), normal(WIDTH, size // 2))
    return {"values_DP": values, "p_DP": p, "B_DP": b, "C_DP": C, "dt_D": torch.tensor([1e-3, 0.03, 0.5]).double()}


def dense_taps(given: dict[str, Tensor], length: int, size: int = SIZE) -> np.ndarray[Any, Any]:
    """C A^k B of the dense HiPPO system by the bilinear rule, solved and multiplied by scipy: (D, L)."""
    A, B, _ = (t.numpy() for t in legs(size))
    V, one = legs_dplr(size).V, np.eye(size)
    found = np.empty((WIDTH, length))
    for d in range(WIDTH):
        dt = float(given["dt_D"][d])
        # y = 2 Re(C V^* x) for the dense state x.
        C = 2 * (given["C_DP"][d] @ V.mH).real.numpy()
        factors = scipy.linalg.lu_factor(one - dt / 2 * A)
        step, state = scipy.linalg.lu_solve(factors, one + dt / 2 * A), scipy.linalg.lu_solve(factors, dt * B)
        for k in range(length):
            found[d, k] = C @ state
            state = step @ state
    return found


@pytest.mark.parametrize("length", [1, 2, 63, 64, 200])
@pytest.mark.parametrize("size", [2, SIZE, 64])
def test_taps_of_the_generating_function_are_the_dense_systems(length: int, size: int) -> None:
    given = continuous(size)
    np.testing.assert_allclose(s4_taps(**given, length=length), dense_taps(given, length, size), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["compiled", "chunk", "fft"])
def test_impulse_response_is_the_dense_systems(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", "auto" if method == "compiled" else "torch")
    given, length = continuous(64), 200
    u = torch.zeros(1, length, WIDTH, dtype=torch.float64)
    u[:, 0] = 1
    taps = s4_taps(**given, length=length) if method == "fft" else None
    y, _ = s4(u, discretise(**given), torch.zeros(WIDTH), torch.zeros(1, WIDTH, 32, 2), chunk_size=32, taps_DL=taps)
    np.testing.assert_allclose(y[0].T, dense_taps(given, length, 64), rtol=0, atol=1e-9)


def run(op: Any, given: dict[str, Tensor], *, fft: bool = False, **options: Any) -> dict[str, Tensor]:
    """Outputs, last state and gradients by everything, from the continuous parameters on."""
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    names = ("values_DP", "p_DP", "B_DP", "C_DP", "dt_D")
    parameters = [leaves[name] for name in names]
    if fft:
        options["taps_DL"] = s4_taps(*parameters, leaves["u"].shape[1])
    y, last = op(leaves["u"], discretise(*parameters), leaves["skip"], leaves["h"], **options)
    generator = torch.Generator().manual_seed(3)
    loss = (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
    loss = loss + (last * torch.randn(last.shape, generator=generator, dtype=torch.float64)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "last": last} | {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}


def resets(length: int) -> Tensor:
    reset = torch.rand(3, length) < 0.05
    reset[1, 0] = True
    reset[2, length // 2 :][:3] = True
    reset[2, -1] = True
    reset[0] = False
    return reset


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["compiled", "chunk", "small chunk", "fft"])
def test_s4_equals_reference(length: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form != "compiled":
        monkeypatch.setattr(dispatch, "KERNELS", "torch")
    given = continuous(6)
    with torch.no_grad():
        for name in ("values_DP", "p_DP", "B_DP"):
            given[name] += 0.1 * torch.complex(normal(WIDTH, 3), normal(WIDTH, 3))
    given |= {"u": normal(3, length, WIDTH), "skip": normal(WIDTH), "h": normal(3, WIDTH, 3, 2)}
    for reset in (None, resets(length)):
        expected = run(s4_reference, given, reset=reset)
        chunk_size = 4 if form == "small chunk" else 64
        found = run(s4, given, fft=form == "fft", reset=reset, chunk_size=chunk_size)
        for name, value in expected.items():
            error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1)
            assert error <= 1e-9, f"{name}: relative error {error}"


def test_discretisation_is_the_bilinear_rule() -> None:
    """Against the dense matrix of one step over all states, both of every pair."""
    given = continuous()
    given["p_DP"] = given["p_DP"] + 0.3j
    system = discretise(**given)
    values, p, B = (torch.cat([given[k], given[k].conj()], 1).numpy() for k in ("values_DP", "p_DP", "B_DP"))
    for d in range(WIDTH):
        A, one, dt = np.diag(values[d]) - np.outer(p[d], p[d].conj()), np.eye(SIZE), float(given["dt_D"][d])
        step = np.linalg.solve(one - dt / 2 * A, one + dt / 2 * A)
        drive = np.linalg.solve(one - dt / 2 * A, dt * B[d])
        w, v, e = (torch.cat([t[d], t[d].conj()]).numpy() for t in (system.w, system.v, system.e))
        np.testing.assert_allclose(np.diag(e) - np.outer(w, v), step, rtol=0, atol=1e-12)
        np.testing.assert_allclose(system.b[d].numpy(), drive[: SIZE // 2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_single_precision_parallel_and_step_stay_together(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    layer = S4.Config(4).build().eval()
    x = torch.randn(1, 4000, 4)
    with torch.no_grad():
        system = layer.system(torch.complex64)
        assert isinstance(system, Discrete)
        y, last = layer.run(x, layer.state_like(x).h, system, None)
        h, stepped = torch.view_as_complex(layer.state_like(x).h), []
        for x_t in x.unbind(1):
            y_t, h = layer.run_step(x_t, h, system)
            stepped.append(y_t)
    torch.testing.assert_close(y, torch.stack(stepped, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, torch.view_as_real(h), rtol=1e-4, atol=1e-4)


def test_resets_at_every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    given = continuous(6) | {"u": normal(3, 70, WIDTH), "skip": normal(WIDTH), "h": normal(3, WIDTH, 3, 2)}
    reset = torch.ones(3, 70, dtype=torch.bool)
    reset[1, ::2] = False
    expected = run(s4_reference, given, reset=reset)
    for kernels in ("auto", "torch"):
        monkeypatch.setattr(dispatch, "KERNELS", kernels)
        for name, value in run(s4, given, reset=reset).items():
            assert (value - expected[name]).abs().max() <= 1e-9, f"{kernels}: {name}"


def test_more_channels_than_lanes() -> None:
    """Two blocks of lanes, the second in part, and threads."""
    system = Discrete(*(torch.complex(normal(20, 3), normal(20, 3)) * 0.3 for _ in range(5)))
    given = (normal(2, 40, 20), system, normal(20), normal(2, 20, 3, 2))
    for found, expected in zip(s4(*given), s4_reference(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(s4(*given)[0], found_y := s4(*given)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found_y, s4(*given)[0])


def test_parameters_in_single_precision_receive_gradients() -> None:
    for method in ("chunk", "fft"):
        layer = S4.Config(4, d_state=8, method=method).build()
        out = layer(torch.randn(2, 100, 4))
        (out.y.sum() + out.state.h.sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters()), method


def test_autocast_runs_and_keeps_the_state_in_single() -> None:
    layer = S4.Config(6, d_state=4).build()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 30, 6)).state.h.dtype == torch.float32


def test_causality_is_declared_by_method() -> None:
    assert S4.Config(4).build().causality == "exact"
    assert S4.Config(4, method="fft").build().causality == "rounding"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"d_state": 5}, "even"),
        ({"chunk_size": 0}, "power of two"),
        ({"dt_min": -1.0}, "dt_min"),
        ({"method": "other"}, "chunk or fft"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        S4.Config(4, **wrong)
    assert "\n" not in str(error.value)
