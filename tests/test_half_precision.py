"""bfloat16 on a CPU: kernels read it as it lies where no gradient is asked, in float32 otherwise, and round once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recollect.ops import dispatch
from recollect.ops.conv import causal_conv
from recollect.ops.gate import gated, gated_rms_norm
from recollect.ops.kernels import gate
from recollect.ops.kernels.compiled import arrays

GIVEN = {"y": (2, 30, 48), "z": (2, 30, 48), "norm": (48,), "taps": (48, 4), "bias": (48,), "window": (2, 3, 48)}


def given(dtype: torch.dtype, gradient: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    rounded = {name: torch.randn(shape, generator=g).bfloat16() for name, shape in GIVEN.items()}
    return {name: t.to(dtype).requires_grad_(gradient) for name, t in rounded.items()}


def outputs(t: dict[str, Tensor]) -> dict[str, Tensor]:
    y, _ = causal_conv(t["y"], t["taps"], t["bias"], t["window"], silu=True)
    wide, _ = causal_conv(t["y"], t["taps"], None, t["window"], wide=True)
    norm = gated_rms_norm(t["y"], t["z"], t["norm"], n_groups=2)
    mixed = gated_rms_norm(t["y"].to(torch.promote_types(t["y"].dtype, torch.float32)), t["z"], t["norm"])
    return {"conv": y, "wide": wide, "gate": gated(t["y"], t["z"]), "norm": norm, "mixed": mixed}


@pytest.mark.parametrize("gradient", [False, True])
def test_results_are_those_of_double_precision_rounded_once(gradient: bool) -> None:
    inputs, exact = given(torch.bfloat16, gradient), given(torch.float64, gradient)
    found, wanted = outputs(inputs), outputs(exact)
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name == "wide" else torch.bfloat16), name
        # Half a unit of the last of 8 binary places, and float32's own rounding.
        rtol, atol = (1e-5, 1e-5) if name == "wide" else (2**-8, 2e-4)
        torch.testing.assert_close(value.double(), wanted[name], rtol=rtol, atol=atol)
    if not gradient:
        return
    # What float32 gives of the same numbers, rounded to bfloat16: sums over positions are of one rounding too.
    torch.stack([v.float().sum() for v in found.values()]).sum().backward()
    torch.stack([v.sum() for v in wanted.values()]).sum().backward()
    for name, t in inputs.items():
        assert t.grad is not None
        assert t.grad.dtype == torch.bfloat16
        torch.testing.assert_close(t.grad.double(), exact[name].grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("gradient", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_what_kernels_are_given(gradient: bool, dtype: torch.dtype) -> None:
    t = given(torch.bfloat16, gradient)
    picked = dispatch.kernels_in_float32("gate", t["y"], t["z"], t["norm"], bits=2)
    assert picked is not None
    assert [tensor.dtype for tensor in picked[1]] == [dtype, dtype, torch.float32]
    double = dispatch.kernels_in_float32("gate", t["y"], t["norm"].double(), bits=1)
    assert double is not None
    assert {tensor.dtype for tensor in double[1]} == {torch.float64}, "bits are widened to float32 alone"


def test_what_is_stored_is_rounded_as_torch_rounds() -> None:
    """Ties to even, infinities, NaN, numbers that round to infinity and those near zero."""
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(1), dtype=torch.int64)
    bits[:2000] = (bits[:2000] & ~0xFFFF) | 0x8000  # half way between two
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.4e38, -3.4e38])
    x = torch.cat([bits.to(torch.int32).view(torch.float32), special])
    x = x[(x.abs() > 1e-37) | (x == 0) | x.isnan()][None]  # below, products are subnormal
    # SiLU(64) is 64 in float32, and x a 64th of what is to be rounded.
    out = torch.empty_like(x, dtype=torch.bfloat16)
    gate.gate_forward(0, 1, *arrays(x / 64, torch.full_like(x, 64.0), out))
    wanted = (x / 64 * 64).bfloat16()
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.nan_to_num(7), wanted.nan_to_num(7))
