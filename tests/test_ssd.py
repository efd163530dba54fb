"""The state-space dual and what stands around it in Mamba-2 (short convolution, gated norm, split projection): compiled
and PyTorch forms against references, in values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.core.errors import ConfigError
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.ops import dispatch
from recollect.ops.conv import causal_conv
from recollect.ops.gate import gated, gated_rms_norm
from recollect.ops.projection import split_linear
from recollect.ops.ssd import STEPS_STATES, ssd, ssd_reference

LENGTHS = (1, 63, 64, 65, 1000)
# Largest error over largest value (at least 1), float32 against the float64 reference at 1,000 positions: measured
# 4e-5 and below, which is what differences of cumulative log-decays near -800 lose.
FLOAT32_TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(params=["auto", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernel and PyTorch's operations."""
    monkeypatch.setattr(dispatch, "KERNELS", request.param)
    return request.param


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
def test_ssd_equals_reference(form: str, length: int, groups: int) -> None:
    given = inputs(length, groups)
    without_reset = {k: v for k, v in given.items() if k != "reset"}
    from_zero = {k: v for k, v in given.items() if k != "h_init"}
    bare = {k: v for k, v in without_reset.items() if k not in ("h_init", "D_H")}
    for case in (given, without_reset, from_zero, bare):
        expected = run(ssd_reference, case)
        for chunk_size in (64, 7) if length < 1000 else (64,):
            assert_near(run(ssd, case, chunk_size=chunk_size), expected, 1e-9)


@pytest.mark.parametrize("d_state", [STEPS_STATES, STEPS_STATES + 1])
def test_ssd_equals_reference_whatever_its_kernel(form: str, d_state: int) -> None:
    """Both compiled kernels, with shares of one head and of two, which take turns in one thread."""
    given = inputs(70, batch=3)
    given |= {k: torch.randn(3, 70, 1, d_state, dtype=torch.float64) for k in ("B_BLGN", "C_BLGN")}
    given["h_init"] = torch.randn(3, 4, 3, d_state, dtype=torch.float64)
    assert_near(run(ssd, given), run(ssd_reference, given), 1e-9)


def test_a_row_without_numbers_leaves_the_others_alone(form: str) -> None:
    given = inputs(40, batch=3)
    spoiled = {k: v.clone() for k, v in given.items()}
    spoiled["x_BLHP"][0] = spoiled["dt_BLH"][0] = torch.nan
    expected, found = run(ssd, given), run(ssd, spoiled)
    for name in ("output 0", "output 1", *(f"gradient of {k}" for k in ("x_BLHP", "dt_BLH", "B_BLGN", "C_BLGN"))):
        torch.testing.assert_close(found[name][1:], expected[name][1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("resets", [True, False])
def test_ssd_in_single_precision(form: str, resets: bool) -> None:
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


def test_steep_growth_above_the_diagonal_stays_finite(form: str) -> None:
    """exp(log_q - log_s) overflows for s > q when decays are strong; neither values nor gradients may see it."""
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(64).items()}
    given["dt_BLH"] = torch.full_like(given["dt_BLH"], 20.0)
    for reset in (given["reset"], None):
        found = run(ssd, {k: v for k, v in given.items() if k != "reset"}, reset=reset)
        assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("length", [20, 70])
def test_nothing_reaches_back_in_time_or_across_a_reset(form: str, length: int) -> None:
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


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 65, 256, 259, 515])
def test_causal_conv_equals_reference(form: str, length: int, taps: int, silu: bool) -> None:
    reset = torch.rand(2, length) < 0.2
    reset[0, 0] = True
    given = {
        "x_BLE": torch.randn(2, length, 3, dtype=torch.float64),
        "weight_EW": torch.randn(3, taps, dtype=torch.float64),
        "bias_E": torch.randn(3, dtype=torch.float64),
        "window_BWE": torch.randn(2, taps - 1, 3, dtype=torch.float64),
        "reset": reset,
    }

    def reference(**case: Tensor) -> tuple[Tensor, Tensor]:
        y, window = conv_reference(**case)
        return (torch.nn.functional.silu(y) if silu else y), window

    for case in (given, {k: v for k, v in given.items() if k != "reset"}):
        expected = {k: v for k, v in run(reference, case).items() if v.numel()}
        assert_near(run(causal_conv, case, silu=silu), expected, 1e-12)
    without_bias = {k: v for k, v in given.items() if k != "bias_E"}
    plain, _ = causal_conv(bias_E=None, silu=silu, **without_bias)
    torch.testing.assert_close(plain, reference(**(given | {"bias_E": torch.zeros(3)}))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
def test_gates_equal_their_equations(form: str, groups: int) -> None:
    given = {name: torch.randn(3, 171, 12, dtype=torch.float64) for name in ("y", "z")}

    def gate(y: Tensor, z: Tensor) -> tuple[Tensor]:
        return (gated(y, z),)

    def gate_reference(y: Tensor, z: Tensor) -> tuple[Tensor]:
        return (y * z * torch.sigmoid(z),)

    assert_near(run(gate, given), run(gate_reference, given), 1e-12)
    given["weight_E"] = torch.randn(12, dtype=torch.float64)

    def norm(weight_E: Tensor, **rest: Tensor) -> tuple[Tensor]:
        return (gated_rms_norm(**rest, weight_E=weight_E, n_groups=groups, eps=0.1),)

    def norm_reference(weight_E: Tensor, **rest: Tensor) -> tuple[Tensor]:
        parts = gate_reference(**rest)[0].chunk(groups, -1)
        normed = [v / torch.sqrt((v * v).mean(-1, keepdim=True) + 0.1) for v in parts]
        return (weight_E * torch.cat(normed, -1),)

    assert_near(run(norm, given), run(norm_reference, given), 1e-12)


def test_split_linear_equals_linear() -> None:
    given = {"x": torch.randn(2, 5, 4, dtype=torch.float64), "weight": torch.randn(9, 4, dtype=torch.float64)}
    sizes = (2, 6, 1)
    expected = run(lambda x, weight: torch.nn.functional.linear(x, weight).split(sizes, -1), given)
    actual = run(lambda x, weight: split_linear(x, weight, sizes), given)
    assert_near(actual, expected, 1e-12)
    assert all(actual[f"output {i}"].is_contiguous() for i in range(3))


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_nothing(batch: int) -> None:
    """Shares of work depend on sizes only, and sums over them are taken in order."""
    scanned = {k: v.float() if v.is_floating_point() else v for k, v in inputs(130, 2, 3, 8).items()}
    scanned = {k: v if k in ("A_H", "D_H") else v[:batch] for k, v in scanned.items()}
    given = {name: torch.randn(batch, 600, 48) for name in ("u", "z")}
    given |= {"weight": torch.randn(48, 4), "scale": torch.randn(48)}

    def around(u: Tensor, z: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor]:
        y, _ = causal_conv(u, weight, None, u.new_zeros(batch, 3, 48), silu=True)
        return (gated_rms_norm(y, z, scale, n_groups=2) + gated(y, z),)

    threads = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append([*run(ssd, scanned).values(), *run(around, given).values()])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, first) for one, first in zip(other, found[0], strict=True))


@pytest.mark.parametrize("config", [Mamba.Config(8, d_state=4), Mamba2.Config(8, d_state=4, d_head=4)])
def test_steps_stay_with_the_parallel_forms_for_4000_positions(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = config.build()
    x = torch.randn(1, 4000, 8)
    with torch.no_grad():
        compiled = layer(x)
        monkeypatch.setattr(dispatch, "KERNELS", "torch")
        plain = layer(x)
        state, outputs = layer.state_like(x), []
        for x_t in x.unbind(1):
            y_t, state = layer.step(x_t, state)
            outputs.append(y_t)
    for out in (compiled, plain):
        torch.testing.assert_close(torch.stack(outputs, 1), out.y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state.ssm, out.state.ssm, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mamba.Config(8, d_conv=-1), "d_conv must be 0"),
        (lambda: Mamba.Config(8, dt_rank=0), "dt_rank must be at least 1"),
        (lambda: Mamba.Config(8, dt_min=0.2), "0 < dt_min <= dt_max"),
        (lambda: Mamba.Config(8, dt_scale=0), "dt_scale must be positive"),
        (lambda: Mamba.Config(8, init_std=0), "init_std must be positive"),
        (lambda: Mamba.Config(8, expand=0), "expand must be at least 1"),
        (lambda: Mamba2.Config(8, d_head=4, d_conv=-1), "d_conv must be 0"),
        (lambda: Mamba2.Config(8, d_head=4, chunk_size=0), "chunk_size must be at least 1"),
        (lambda: Mamba2.Config(8, d_head=4, dt_max=1e-4), "0 < dt_min <= dt_max"),
        (lambda: Mamba2.Config(8, d_head=5), "not divisible by d_head 5"),
        (lambda: Mamba2.Config(8, d_head=4, n_groups=3), "not divisible by n_groups 3"),
    ],
)
def test_bad_configs_end_in_one_line(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
