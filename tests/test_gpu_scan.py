"""The GPU's diagonal scans against the recurrence as it is written, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recollect.ops.gpu import scan as kernels
from recollect.ops.mimo_ssm import mimo_ssm, mimo_ssm_reference
from recollect.ops.scan import scan, scan_reference

pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter scans number by number, also what is beyond the last channel."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "CHANNELS", 4)


def run(op: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, last state, and gradients of a random function of both by every differentiable input."""
    leaves = {k: v.to(DEVICE).clone() for k, v in given.items()}
    wanted = [v.requires_grad_() for v in leaves.values() if v.dtype != torch.bool]
    outputs = op(**leaves)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t) for t in outputs]
    torch.autograd.backward(outputs, weights)
    names = [k for k, v in leaves.items() if v.dtype != torch.bool]
    found = {f"gradient of {k}": v.grad for k, v in zip(names, wanted, strict=True)}
    return {"output": outputs[0].detach(), "last": outputs[1].detach()} | {
        k: v for k, v in found.items() if v is not None
    }


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        wide = actual[name].to(torch.promote_types(value.dtype, torch.float32))
        error = (wide - value).norm() / value.norm().clamp_min(1e-3)
        assert error <= tolerance, f"{name}: relative error {error}"


def inputs(batch: int, length: int, width: int, *, varying: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    decay = torch.rand(*((batch, length) if varying else ()), width) * 0.5 + 0.5
    if dtype.is_complex:
        decay = decay * torch.exp(1j * torch.randn_like(decay))
    reset = torch.rand(batch, length) < 0.1
    reset[0, 0] = True
    reset[-1, length // 2 :][:2] = True
    return {
        "a": decay.to(dtype),
        "b": torch.randn(batch, length, width, dtype=dtype),
        "h_init": torch.randn(batch, width, dtype=dtype),
        "reset": reset,
        "h_reset": torch.randn(width, dtype=dtype),
    }


@pytest.mark.parametrize(
    ("batch", "length", "width"), [(1, 1, 1), (3, 63, 5), (1, 65, 3)], ids=["one", "rows", "spans"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["real", "complex"])
@pytest.mark.parametrize("varying", [False, True], ids=["constant", "varying"])
def test_scan(
    batch: int, length: int, width: int, dtype: torch.dtype, varying: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if length == 65:  # several spans, the last one ragged
        monkeypatch.setattr(kernels, "PROGRAMS", 6)
        monkeypatch.setattr(kernels, "SPAN_TILES", 1)
    given = inputs(batch, length, width, varying=varying, dtype=dtype)
    assert_near(run(scan, given), run(scan_reference, given), 1e-5)
    if varying or length == 65:
        del given["reset"], given["h_reset"]
        assert_near(run(scan, given), run(scan_reference, given), 1e-5)


def test_every_row_may_have_its_own_state_after_a_reset() -> None:
    given = inputs(3, 20, 5, varying=False, dtype=torch.complex64)
    given["h_reset"] = torch.randn(3, 5, dtype=torch.complex64)
    assert_near(run(scan, given), run(scan_reference, given), 1e-5)


def test_half_precision_is_read_as_it_is_and_summed_in_float32() -> None:
    given = inputs(2, 65, 3, varying=True, dtype=torch.float32)
    half = {k: v.bfloat16() if k in "ab" else v for k, v in given.items()}
    rounded = {k: v.float() if k in "ab" else v for k, v in half.items()}
    actual, expected = run(scan, half), run(scan_reference, rounded)
    assert actual["output"].dtype == torch.float32
    assert actual["gradient of a"].dtype == torch.bfloat16
    gradients = {k for k in expected if k in ("gradient of a", "gradient of b")}
    assert_near({k: actual[k] for k in gradients}, {k: expected[k] for k in gradients}, 1e-2)
    for some in (actual, expected):
        for k in gradients:
            del some[k]
    assert_near(actual, expected, 1e-5)


def test_a_suffix_does_not_touch_the_prefix() -> None:
    given = inputs(1, 40, 3, varying=False, dtype=torch.float32)
    given = {k: v.to(DEVICE) for k, v in given.items()}
    before, _ = scan(**given)
    given["b"] = torch.cat([given["b"][:, :23], -3 * given["b"][:, 23:]], 1)
    after, _ = scan(**given)
    assert torch.equal(before[:, :23], after[:, :23])


@pytest.mark.parametrize("resets", [False, True])
def test_mimo_ssm(resets: bool) -> None:
    batch, length, width, states = 2, 33, 5, 6
    given = inputs(batch, length, states, varying=False, dtype=torch.complex64)

    def split(t: Tensor) -> Tensor:
        return torch.cat([t.real, t.imag], -1)

    system = {
        "u_BLD": torch.randn(batch, length, width),
        "a_2N": torch.view_as_real(given["a"]).T.contiguous(),
        "inward_RD": torch.randn(2 * states, width),
        "outward_DR": torch.randn(width, 2 * states),
        "skip_D": torch.randn(width),
        "h_init": split(given["h_init"]),
    }
    if resets:
        system |= {"reset": given["reset"], "h_reset": split(given["h_reset"])}
    assert_near(run(mimo_ssm, system), run(mimo_ssm_reference, system), 1e-5)
