"""The GPU's depthwise convolution against the sum of shifted products, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recollect.ops import dispatch
from recollect.ops.conv import causal_conv
from recollect.ops.gpu import conv as kernels

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch: int, length: int, channels: int, taps: int) -> dict[str, Tensor]:
    reset = torch.rand(batch, length) < 0.1
    reset[0, :1] = reset[-1, length // 2 :][:2] = True
    given = {
        "x_BLE": torch.randn(batch, length, channels),
        "weight_EW": torch.randn(channels, taps),
        "bias_E": torch.randn(channels),
        "window_BWE": torch.randn(batch, taps - 1, channels),
        "reset": reset,
    }
    return {k: v.to(DEVICE) for k, v in given.items()}


def run(given: dict[str, Tensor | None], silu: bool) -> dict[str, Tensor]:
    """Output, next window, and the gradients of a random function of both."""
    leaves = {k: v.clone().requires_grad_() if v is not None and v.is_floating_point() else v for k, v in given.items()}
    y, window = causal_conv(**leaves, silu=silu)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in (y, window)]
    torch.autograd.backward([y, window], weights)
    found = {f"gradient of {k}": v.grad for k, v in leaves.items() if v is not None}
    return {"y": y.detach(), "window": window.detach()} | {k: v for k, v in found.items() if v is not None}


def compare(given: dict[str, Tensor | None], silu: bool, tolerance: float, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dispatch, "KERNELS", "torch")
    wide = {k: v.float() if v is not None and v.is_floating_point() else v for k, v in given.items()}
    expected = run(wide, silu)
    patch.setattr(dispatch, "KERNELS", "triton")
    actual = run(given, silu)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].float() - value).norm() / value.norm().clamp_min(1e-3)
        assert error <= tolerance, f"{name}: relative error {error}"


@pytest.mark.parametrize(
    ("batch", "length", "channels", "taps"),
    [(1, 1, 3, 4), (2, 63, 65, 4), (1, 130, 5, 3), (3, 33, 7, 2), (1, 20, 3, 1)],
)
@pytest.mark.parametrize("silu", [False, True])
def test_causal_conv(
    batch: int, length: int, channels: int, taps: int, silu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SPAN", 64)
    monkeypatch.setattr(kernels, "TIME", 64 if length == 130 else 32)
    given = inputs(batch, length, channels, taps)
    if channels == 65:
        compare({**given}, silu, 1e-5, monkeypatch)
    else:
        compare(given | {"bias_E": None}, silu, 1e-5, monkeypatch)
        compare(given | {"reset": None}, silu, 1e-5, monkeypatch)


def test_bfloat16_and_a_slice_of_a_wider_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(2, 40, 16, 4).items()}
    given["x_BLE"] = torch.randn(2, 40, 48, dtype=torch.bfloat16, device=DEVICE)[..., 16:32]
    compare({**given}, True, 1e-2, monkeypatch)


def test_mixed_dtypes_promote_as_pytorch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(2, 20, 5, 4)
    given["x_BLE"] = given["x_BLE"].bfloat16()
    compare({**given}, True, 1e-2, monkeypatch)
    assert causal_conv(**given)[0].dtype == torch.float32
