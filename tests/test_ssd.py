"""The state-space dual and its short convolution: fast against reference in values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.ops.conv import causal_conv
from recollect.ops.ssd import ssd, ssd_reference

LENGTHS = (1, 63, 64, 65, 1000)
# Largest error over largest value (at least 1), float32 against the float64 reference at 1,000 positions: measured
# 4e-5 and below, which is what differences of cumulative log-decays near -800 lose.
FLOAT32_TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def inputs(length: int, groups: int = 1, batch: int = 2, heads: int = 4) -> dict[str, Tensor]:
    """Everything ``ssd`` takes; decays per position from 0.9999 down to underflow (dt A = -800 in some places)."""
    dt = torch.rand(batch, length, heads, dtype=torch.float64) * 0.1 + 1e-3
    dt[:, length // 3] = 50
    reset = torch.rand(batch, length) < 0.03
    reset[0, :2] = True
    reset[1, length // 2 :][:2] = True
    return {
        "x_BLHP": torch.randn(batch, length, heads, 3, dtype=torch.float64),
        "dt_BLH": dt,
        "A_H": -torch.linspace(0.1, 16, heads, dtype=torch.float64),
        "B_BLGN": torch.randn(batch, length, groups, 5, dtype=torch.float64),
        "C_BLGN": torch.randn(batch, length, groups, 5, dtype=torch.float64),
        "D_H": torch.randn(heads, dtype=torch.float64),
        "h_init": torch.randn(batch, heads, 3, 5, dtype=torch.float64),
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


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_ssd_equals_reference(length: int, groups: int) -> None:
    given = inputs(length, groups)
    without_reset = {k: v for k, v in given.items() if k != "reset"}
    from_zero = {k: v for k, v in given.items() if k != "h_init"}
    bare = {k: v for k, v in without_reset.items() if k not in ("h_init", "D_H")}
    for case in (given, without_reset, from_zero, bare):
        expected = run(ssd_reference, case)
        for chunk_size in (64, 7) if length < 1000 else (64,):
            assert_near(run(ssd, case, chunk_size=chunk_size), expected, 1e-9)


@pytest.mark.parametrize("resets", [True, False])
def test_ssd_in_single_precision(resets: bool) -> None:
    given = inputs(1000, 2)
    if not resets:
        del given["reset"]
    single = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    actual = run(ssd, single)
    assert actual["output 0"].dtype == torch.float32
    assert_near(actual, run(ssd_reference, given), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_summed_in_single(autocast: bool) -> None:
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(65).items()}
    expected, _ = ssd_reference(**half)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = ssd(**half)
    assert (y.dtype, state.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_steep_growth_above_the_diagonal_stays_finite() -> None:
    """exp(log_q - log_s) overflows for s > q when decays are strong; neither values nor gradients may see it."""
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(64).items()}
    given["dt_BLH"] = torch.full_like(given["dt_BLH"], 20.0)
    for reset in (given["reset"], None):
        found = run(ssd, {k: v for k, v in given.items() if k != "reset"}, reset=reset)
        assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("length", [20, 70])
def test_nothing_reaches_back_in_time_or_across_a_reset(length: int) -> None:
    given = inputs(length)
    given["reset"] = torch.zeros(2, length, dtype=torch.bool)
    given["reset"][:, 5] = True
    varied = ("x_BLHP", "dt_BLH", "B_BLGN", "C_BLGN")
    leaves = {k: given[k].clone().requires_grad_() for k in varied}
    y, _ = ssd(**(given | leaves), chunk_size=16)
    grads = torch.autograd.grad(y[:, 12].sum(), list(leaves.values()))
    for name, grad in zip(varied, grads, strict=True):
        assert (grad[:, 13:] == 0).all(), name
        assert grad[:, :5].abs().max() < 1e-12, name
    changed = {k: torch.cat([given[k][:, :13], given[k][:, 13:] * 3 + 1], 1) for k in varied}
    assert torch.equal(ssd(**(given | changed), chunk_size=16)[0][:, :13], y[:, :13])


def conv_reference(
    x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, window_BWE: Tensor, *, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``causal_conv`` one position after the other, with a window that a reset empties."""
    outputs = []
    for t, x_BE in enumerate(x_BLE.unbind(1)):
        if reset is not None:
            window_BWE = window_BWE * ~reset[:, t, None, None]
        inputs_BWE = torch.cat([window_BWE, x_BE.unsqueeze(1)], 1)
        outputs.append((inputs_BWE * weight_EW.T).sum(1) + bias_E)
        window_BWE = inputs_BWE[:, 1:]
    return torch.stack(outputs, 1), window_BWE


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 65])
def test_causal_conv_equals_reference(length: int, taps: int) -> None:
    reset = torch.rand(2, length) < 0.2
    reset[0, 0] = True
    given = {
        "x_BLE": torch.randn(2, length, 3, dtype=torch.float64),
        "weight_EW": torch.randn(3, taps, dtype=torch.float64),
        "bias_E": torch.randn(3, dtype=torch.float64),
        "window_BWE": torch.randn(2, taps - 1, 3, dtype=torch.float64),
        "reset": reset,
    }
    for case in (given, {k: v for k, v in given.items() if k != "reset"}):
        expected = {k: v for k, v in run(conv_reference, case).items() if v.numel()}
        assert_near(run(causal_conv, case), expected, 1e-12)
