"""S4D and DSS: the diagonal op against its reference and dense matrix exponentials; resets; single precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from recollect.core.errors import ConfigError
from recollect.layers.dss import DSS
from recollect.layers.s4d import S4D
from recollect.ops import dispatch
from recollect.ops.chunking import chunk_size_for, reset_rows
from recollect.ops.hippo import diagonal, legs, legs_dplr, legs_normal
from recollect.ops.siso_ssm import siso_ssm, siso_ssm_reference

LENGTHS = (1, 63, 64, 65, 1000)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(params=["auto", "torch"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(dispatch, "KERNELS", request.param)
    return request.param


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def resets(batch: int, length: int) -> Tensor:
    """None in the first row; else sparse, at the first and last position and side by side."""
    reset = torch.rand(batch, length) < 0.05
    reset[1:, : length // 3 : max(1, length // 3)] = True
    reset[2, length // 2 :][:3] = True
    reset[2, -1] = True
    reset[0] = False
    return reset


def inputs(length: int, width: int, pairs: int, *, batch: int = 3) -> dict[str, Tensor]:
    decay = torch.rand(width, pairs, dtype=torch.float64) * 0.3 + 0.7
    return {
        "u_BLD": normal(batch, length, width),
        "a_DP": decay * torch.exp(1j * normal(width, pairs)),
        "c_DP": torch.complex(normal(width, pairs), normal(width, pairs)),
        "skip_D": normal(width),
        "h_init": normal(batch, width, pairs, 2),
    }


def run(op: Any, given: dict[str, Tensor], *, last_weight: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """Outputs, last state and the gradients of a random function of them."""
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    y, last = op(**leaves, **options)
    generator = torch.Generator().manual_seed(3)
    loss = (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
    if last_weight:
        loss = loss + last_weight * (last * torch.randn(last.shape, generator=generator, dtype=torch.float64)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "last": last} | {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() / value.abs().max().clamp_min(1)
        assert error <= tolerance, f"{name}: relative error {error}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("width", "pairs"), [(3, 4), (65, 1)])
@pytest.mark.usefixtures("_kernels")
def test_diagonal_equals_reference(length: int, width: int, pairs: int) -> None:
    given = inputs(length, width, pairs)
    for reset in (None, resets(3, length)):
        expected = run(siso_ssm_reference, given, reset=reset)
        assert_near(run(siso_ssm, given, reset=reset), expected)
    if length < 1000:
        expected = run(siso_ssm_reference, given, last_weight=0.0)
        assert_near(run(siso_ssm, given, last_weight=0.0), expected)
        nothing = torch.zeros(3, length, dtype=torch.bool)
        assert_near(run(siso_ssm, given, reset=nothing), run(siso_ssm_reference, given))


@pytest.mark.usefixtures("_kernels")
def test_resets_at_every_position() -> None:
    given = inputs(70, 3, 2)
    reset = torch.ones(3, 70, dtype=torch.bool)
    reset[1, ::2] = False
    assert_near(run(siso_ssm, given, reset=reset), run(siso_ssm_reference, given, reset=reset))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    given = inputs(50, 70, 3)
    alone = run(siso_ssm, given)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, value in run(siso_ssm, given).items():
            assert torch.equal(value, alone[name]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("_kernels")
def test_half_precision_is_summed_in_single() -> None:
    given = {k: v.to(torch.complex64 if v.is_complex() else torch.float32) for k, v in inputs(65, 3, 2).items()}
    expected, _ = siso_ssm(**given)
    half = {k: v if v.is_complex() else v.bfloat16() for k, v in given.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, last = siso_ssm(**half)
    assert (y.dtype, last.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.3)


@pytest.mark.usefixtures("_kernels")
def test_a_sum_that_overflowed_is_forgotten_at_a_reset() -> None:
    given = inputs(40, 3, 2)
    given["h_init"][0] = torch.inf
    reset = torch.zeros(3, 40, dtype=torch.bool)
    reset[0, 20] = True
    y, last = siso_ssm(**given, reset=reset, chunk_size=16)
    assert y[0, 20:].isfinite().all()
    assert last.isfinite().all()


def test_rows_of_a_layout() -> None:
    reset = torch.tensor([[0, 0, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0]], dtype=torch.bool)
    rows = reset_rows(reset, 4)
    assert rows.chunk.tolist() == [0, 3, 3]
    assert rows.input.int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert rows.output.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]]
    assert rows.before.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert rows.closing.tolist() == [0, 2]
    assert rows.restart.tolist() == [[False, True], [False, False]]
    assert rows.cut.tolist() == [[True, False], [False, True]]


def test_dense_resets_take_small_chunks() -> None:
    assert chunk_size_for(64, 2048, 64, 8, 0) == 64
    assert chunk_size_for(64, 2048, 64, 8, 8) == 64
    assert chunk_size_for(64, 2048, 64, 8, 8 * 2048) < 32


@pytest.mark.parametrize("size", [2, 8, 64])
def test_hippo_is_what_its_definition_says(size: int) -> None:
    system = legs(size)
    for n in range(size):
        assert system.B[n] == pytest.approx((2 * n + 1) ** 0.5, rel=1e-15)
        for k in range(size):
            expected = -(((2 * n + 1) * (2 * k + 1)) ** 0.5) if n > k else -(n + 1) if n == k else 0
            assert system.A[n, k] == pytest.approx(expected, abs=1e-12)
    values, b, V, p = (getattr(legs_dplr(size), name) for name in ("values", "b", "V", "p"))
    full = 2 * (V @ torch.diag(values) @ V.mH).real
    torch.testing.assert_close(full - torch.outer(system.p, system.p), system.A, rtol=0, atol=1e-10 * size)
    torch.testing.assert_close(2 * (V @ b).real, system.B, rtol=0, atol=1e-10)
    torch.testing.assert_close(2 * (V @ p).real, system.p, rtol=0, atol=1e-10)
    found = np.linalg.eigvals((system.A + torch.outer(system.p, system.p)).numpy())
    above = np.sort(found.imag[found.imag > 0])
    np.testing.assert_allclose(np.sort(values.imag.numpy()), above, rtol=1e-9)
    np.testing.assert_allclose(values.real.numpy(), -0.5, rtol=1e-9)


def test_simpler_diagonals() -> None:
    torch.testing.assert_close(diagonal("lin", 6).imag, torch.pi * torch.arange(3.0).double())
    expected = [6 / np.pi * (6 / (2 * n + 1) - 1) for n in range(3)]
    torch.testing.assert_close(diagonal("inv", 6).imag, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(diagonal("legs", 6), legs_normal(6)[0])


def continuous(layer: S4D | DSS) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A and C of every channel with both states of a pair, and dt, as numpy arrays."""
    A = (-torch.exp(layer.log_A_real) + 1j * layer.A_imag).detach().numpy()
    C = torch.view_as_complex(layer.C).detach().numpy()
    return np.concatenate([A, A.conj()], 1), np.concatenate([C, C.conj()], 1), layer.log_dt.exp().detach().numpy()


def impulse_response(layer: S4D | DSS, length: int) -> np.ndarray[Any, Any]:
    """(D, L) of the layer's core, the skip left out."""
    x = torch.zeros(1, length, layer.d_inner, dtype=torch.float64)
    x[:, 0] = 1
    with torch.no_grad():
        y, _ = layer.run(x, layer.state_like(x).h, layer.system(torch.complex128), None)
        y[:, 0] -= layer.D
    return y[0].T.numpy()


@pytest.mark.parametrize("init", ["legs", "lin", "inv"])
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_s4d_is_the_discretised_dense_system(init: Any, rule: Any) -> None:
    layer = S4D(S4D.Config(3, d_state=8, init=init, discretisation=rule)).double()
    A, C, dt = continuous(layer)
    found = impulse_response(layer, 50)
    one = np.eye(8)
    for d in range(3):
        dense = np.diag(A[d])
        if rule == "zoh":
            # The exponential of [[A, B], [0, 0]] holds both parts of the zero-order hold.
            joint = np.zeros((9, 9), complex)
            joint[:8, :8], joint[:8, 8] = dense, 1
            joint = scipy.linalg.expm(dt[d] * joint)
            step, drive = joint[:8, :8], joint[:8, 8]
        else:
            step = np.linalg.solve(one - dt[d] / 2 * dense, one + dt[d] / 2 * dense)
            drive = np.linalg.solve(one - dt[d] / 2 * dense, dt[d] * np.ones(8))
        expected = [C[d] @ np.linalg.matrix_power(step, k) @ drive for k in range(50)]
        np.testing.assert_allclose(found[d], np.real(expected), rtol=0, atol=1e-9)


def test_dss_softmax_is_the_papers_kernel_at_its_length() -> None:
    """Proposition 1b, row by row, at L = max_length."""
    layer = DSS(DSS.Config(3, d_state=8, variant="softmax", max_length=60)).double()
    A, C, dt = continuous(layer)
    rows = np.exp(A[:, :, None] * dt[:, None, None] * np.arange(60))
    softmax = rows / rows.sum(-1, keepdims=True)
    expected = np.einsum("dn,dnl->dl", C / A, softmax)
    # The bounded inverse moves it by about 1e-7 over the squared sum.
    np.testing.assert_allclose(impulse_response(layer, 60), expected.real, rtol=0, atol=1e-7)
    assert np.abs(expected.imag).max() < 1e-12


def test_dss_exp_is_the_zero_order_hold() -> None:
    layer = DSS(DSS.Config(3, d_state=8)).double()
    A, C, dt = continuous(layer)
    steps = np.exp(A[:, :, None] * dt[:, None, None] * np.arange(40))
    expected = np.einsum("dn,dnl->dl", C / A * (np.exp(A * dt[:, None]) - 1), steps)
    np.testing.assert_allclose(impulse_response(layer, 40), expected.real, rtol=0, atol=1e-9)


@pytest.mark.parametrize("config", [S4D.Config(4, init="lin"), DSS.Config(4), DSS.Config(4, variant="softmax")])
@pytest.mark.usefixtures("_kernels")
def test_single_precision_parallel_and_step_stay_together(config: Any) -> None:
    layer = config.build().eval()
    x = torch.randn(1, 4000, 4)
    with torch.no_grad():
        y, last = layer.run(x, layer.state_like(x).h, system := layer.system(torch.complex64), None)
        h, stepped = torch.view_as_complex(layer.state_like(x).h), []
        for x_t in x.unbind(1):
            y_t, h = layer.run_step(x_t, h, system)
            stepped.append(y_t)
    torch.testing.assert_close(y, torch.stack(stepped, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, torch.view_as_real(h), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("config", [S4D.Config(6, d_state=4), DSS.Config(6, d_state=4)])
def test_autocast_runs_and_keeps_the_state_in_single(config: Any) -> None:
    layer = config.build()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(2, 30, 6))
    assert out.state.h.dtype == torch.float32
    out.y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("cls", [S4D, DSS])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"d_state": 7}, "even"),
        ({"d_state": 0}, "even"),
        ({"chunk_size": 0}, "power of two"),
        ({"chunk_size": 48}, "power of two"),
        ({"dt_min": -0.1}, "dt_min"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_max"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(cls: Any, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        cls.Config(4, **wrong)
    assert "\n" not in str(error.value)


def test_unknown_options() -> None:
    wrong: Any = "other"
    for make, said in (
        (lambda: S4D.Config(4, init=wrong), "legs, lin or inv"),
        (lambda: S4D.Config(4, discretisation=wrong), "zoh or bilinear"),
        (lambda: DSS.Config(4, variant=wrong), "exp or softmax"),
        (lambda: DSS.Config(4, max_length=0), "max_length"),
    ):
        with pytest.raises(ConfigError, match=said):
            make()
