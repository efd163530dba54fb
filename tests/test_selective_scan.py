"""The selective scan: compiled and PyTorch forms against the reference, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.ops import dispatch
from recollect.ops.selective_scan import selective_scan, selective_scan_reference

LENGTHS = (1, 63, 64, 65, 1000)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(params=["auto", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernel and PyTorch's operations."""
    monkeypatch.setattr(dispatch, "KERNELS", request.param)
    return request.param


def inputs(length: int, channels: int = 5, batch: int = 2, d_state: int = 3) -> dict[str, Tensor]:
    """Everything the scan takes; decays per position from 0.999 down to underflow."""
    dt = torch.rand(batch, length, channels, dtype=torch.float64) * 0.1 + 1e-3
    dt[:, length // 3] = 50
    reset = torch.rand(batch, length) < 0.03
    reset[0, :2] = True
    reset[1, length // 2 :][:2] = True
    return {
        "u_BLE": torch.randn(batch, length, channels, dtype=torch.float64),
        "dt_BLE": dt,
        "A_EN": -torch.linspace(0.1, 16, channels * d_state, dtype=torch.float64).view(channels, d_state),
        "B_BLN": torch.randn(batch, length, d_state, dtype=torch.float64),
        "C_BLN": torch.randn(batch, length, d_state, dtype=torch.float64),
        "D_E": torch.randn(channels, dtype=torch.float64),
        "h_init": torch.randn(batch, channels, d_state, dtype=torch.float64),
        "reset": reset,
    }


def run(op: Callable[..., tuple[Tensor, ...]], given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of a random function of all of them by every differentiable input."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if v.is_floating_point()}
    outs = op(**{k: leaves.get(k, v) for k, v in given.items()}, **options)
    generator = torch.Generator().manual_seed(3)
    loss = sum((out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum() for out in outs)
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {f"output {i}": out for i, out in enumerate(outs)}
    return found | {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() / value.abs().max().clamp_min(1)
        assert error <= tolerance, f"{name}: relative error {error}"


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_equals_reference(form: str, length: int, softplus: bool) -> None:
    given = inputs(length)
    if softplus:
        given["dt_BLE"] = torch.randn_like(given["dt_BLE"]) * 4 - 3
    without_reset = {k: v for k, v in given.items() if k != "reset"}
    from_zero = {k: v for k, v in given.items() if k != "h_init"}
    bare = {k: v for k, v in without_reset.items() if k not in ("h_init", "D_E")}
    for case in (given, without_reset, from_zero, bare) if length < 1000 else (given, bare):
        expected = run(selective_scan_reference, case, softplus=softplus)
        assert_near(run(selective_scan, case, softplus=softplus), expected, 1e-10)


@pytest.mark.parametrize(("batch", "channels", "d_state"), [(1, 200, 16), (3, 64, 1), (9, 65, 4), (1, 1, 17)])
def test_every_shape_of_blocks_and_shares(form: str, batch: int, channels: int, d_state: int) -> None:
    given = inputs(37, channels, batch, d_state) if batch > 1 else inputs(37, channels, 2, d_state)
    if batch == 1:
        given = {k: v if k in ("A_EN", "D_E") else v[1:] for k, v in given.items()}
    assert_near(run(selective_scan, given), run(selective_scan_reference, given), 1e-10)


def test_threads_change_nothing() -> None:
    for batch in (1, 3):
        given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(70, 150, 3, 16).items()}
        given = {k: v if k in ("A_EN", "D_E") else v[:batch] for k, v in given.items()}
        threads = torch.get_num_threads()
        try:
            found = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                found.append(run(selective_scan, given))
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(torch.equal(other[name], value) for name, value in found[0].items())


def test_single_precision(form: str) -> None:
    given = inputs(1000, 20, 2, 16)
    single = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    actual = run(selective_scan, single)
    assert actual["output 0"].dtype == torch.float32
    assert_near(actual, run(selective_scan_reference, given), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_and_large_steps_keep_their_digits_under_softplus(dtype: torch.dtype) -> None:
    """One position from zero with B = C = u = 1 and D = 0 gives y = dt itself."""
    raw = torch.linspace(-80, 80, 4001, dtype=torch.float64).view(1, 1, -1).to(dtype).requires_grad_()
    one = torch.ones(1, 1, 1, dtype=dtype)
    y, _ = selective_scan(torch.ones_like(raw), raw, -torch.ones(4001, 1, dtype=dtype), one, one, softplus=True)
    x = raw.detach().double()
    wanted = torch.log1p(torch.exp(-x.abs())) + x.clamp_min(0)
    close = {torch.float32: 5e-7, torch.float64: 1e-15}[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=close, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), raw)
    torch.testing.assert_close(grad.double(), torch.sigmoid(x), rtol=close, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_summed_in_single(autocast: bool) -> None:
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(65).items()}
    expected, _ = selective_scan_reference(**half)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = selective_scan(**half)
    assert (y.dtype, state.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_nothing_reaches_back_in_time_or_across_a_reset(form: str) -> None:
    given = inputs(70)
    given["reset"] = torch.zeros(2, 70, dtype=torch.bool)
    given["reset"][:, 5] = True
    varied = ("u_BLE", "dt_BLE", "B_BLN", "C_BLN")
    leaves = {k: given[k].clone().requires_grad_() for k in varied}
    y, _ = selective_scan(**(given | leaves))
    grads = torch.autograd.grad(y[:, 40].sum(), list(leaves.values()))
    for name, grad in zip(varied, grads, strict=True):
        assert (grad[:, 41:] == 0).all(), name
        assert (grad[:, :5] == 0).all(), name
    changed = {k: torch.cat([given[k][:, :13], given[k][:, 13:] * 3 + 1], 1) for k in varied}
    assert torch.equal(selective_scan(**(given | changed))[0][:, :13], y[:, :13])


def test_inputs_may_lie_in_memory_as_they_like(form: str) -> None:
    given = inputs(40)
    twisted = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in given.items()}
    assert_near(run(selective_scan, twisted), run(selective_scan, given), 1e-12)
