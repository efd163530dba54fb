"""The GPU's state-space models of one input and one output against the recurrence in float64, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from recollect.layers.channelwise import ChannelSSM
from recollect.layers.dss import DSS
from recollect.layers.s4d import S4D
from recollect.ops import dispatch
from recollect.ops.gpu import siso_ssm as kernels
from recollect.ops.siso_ssm import siso_ssm, siso_ssm_reference

pytestmark = pytest.mark.usefixtures("poisoned_empty", "triton_kernels")

Op = Callable[..., tuple[Tensor, Tensor]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def _spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """37 positions make three spans, the last one ragged."""
    monkeypatch.setattr(kernels, "TILE", 4)
    monkeypatch.setattr(kernels, "TILE_BACK", 2)


def inputs(batch: int, length: int, width: int, pairs: int) -> dict[str, Tensor]:
    decay = torch.rand(width, pairs) * 0.3 + 0.7
    given = {
        "u_BLD": torch.randn(batch, length, width),
        "a_DP": decay * torch.exp(1j * torch.randn(width, pairs)),
        "c_DP": torch.randn(width, pairs, dtype=torch.complex64),
        "skip_D": torch.randn(width),
        "h_init": torch.randn(batch, width, pairs, 2),
    }
    return {k: v.to(DEVICE) for k, v in given.items()}


def resets(batch: int, length: int) -> Tensor:
    """At the first and the last position, side by side, and few elsewhere."""
    reset = torch.rand(batch, length) < 0.05
    reset[0, 0] = reset[-1, -1] = True
    reset[-1, length // 2 :][:2] = True
    return reset.to(DEVICE)


def wide(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.to(torch.complex128 if v.is_complex() else torch.float64) for k, v in given.items()}


def run(
    op: Op,
    given: dict[str, Tensor],
    reset: Tensor | None = None,
    of: tuple[str, ...] = ("y", "last"),
) -> dict[str, Tensor]:
    """Outputs, and the gradients of a random function of those in ``of``."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items()}
    y, last = op(**leaves, reset=reset)
    outputs: dict[str, Tensor] = {"y": y, "last": last}
    generator = torch.Generator().manual_seed(3)
    weights = {k: torch.randn(t.shape, generator=generator).to(t) for k, t in outputs.items()}
    torch.autograd.backward([outputs[k] for k in of], [weights[k] for k in of])
    found = {f"gradient of {k}": v.grad for k, v in leaves.items() if v.grad is not None}
    return {k: v.detach() for k, v in outputs.items()} | found


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm().clamp_min(1e-3)
        assert error <= tolerance, f"{name}: relative error {error}"


@pytest.mark.parametrize("resetting", [False, True], ids=["", "resets"])
@pytest.mark.parametrize(
    ("batch", "length", "width", "pairs"),
    [(1, 1, 1, 1), (2, 9, 5, 6), (1, 3, 2, 130)],
    ids=["one", "blocks", "many states"],
)
def test_siso_ssm(
    batch: int, length: int, width: int, pairs: int, resetting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pairs == 6:  # two blocks of channels, the last one ragged
        monkeypatch.setattr(kernels, "HELD", 1)
    given, reset = inputs(batch, length, width, pairs), resets(batch, length) if resetting else None
    of = ("y",) if resetting else ("y", "last")
    assert_near(run(siso_ssm, given, reset, of), run(siso_ssm_reference, wide(given), reset, of))


@pytest.mark.usefixtures("_spans")
@pytest.mark.parametrize(
    ("at", "of"),  # resets at the first and the last position of a span, of all
    [((), ("y", "last")), ((0, 36), ("y",)), ((15,), ("y",)), ((16,), ("last",))],
    ids=["no reset", "ends", "last", "first"],
)
def test_spans(at: tuple[int, ...], of: tuple[str, ...]) -> None:
    given, reset = inputs(1, 37, 2, 3), None
    assert kernels.cut_time(given["u_BLD"], 3).spans == 3
    if at:
        reset = torch.zeros(1, 37, dtype=torch.bool, device=DEVICE)
        reset[0, list(at)] = True
    assert_near(run(siso_ssm, given, reset, of), run(siso_ssm_reference, wide(given), reset, of))


@pytest.mark.usefixtures("_spans")
def test_rows_with_resets_everywhere() -> None:
    given, reset = inputs(2, 17, 2, 3), torch.ones(2, 17, dtype=torch.bool, device=DEVICE)
    reset[1, 3:11] = False
    assert kernels.cut_time(given["u_BLD"], 3).spans == 2
    assert_near(run(siso_ssm, given, reset, ("y",)), run(siso_ssm_reference, wide(given), reset, ("y",)))


@pytest.mark.parametrize("of", ["y", "last"])
def test_the_gradient_of_one_output_alone(of: str) -> None:
    given, reset = inputs(2, 6, 3, 2), resets(2, 6)
    actual, expected = (run(op, x, reset, (of,)) for op, x in ((siso_ssm, given), (siso_ssm_reference, wide(given))))
    for name in ("gradient of c_DP", "gradient of skip_D"):  # of the last state there is none
        expected.setdefault(name, torch.zeros_like(actual[name]))
    assert_near(actual, expected)


def test_half_precision_is_read_as_it_is_and_summed_in_float32() -> None:
    given = inputs(2, 9, 3, 2)
    half = given | {"u_BLD": given["u_BLD"].bfloat16()}
    actual, expected = run(siso_ssm, half), run(siso_ssm_reference, wide(half))
    assert (actual["y"].dtype, actual["last"].dtype) == (torch.float32, torch.float32)
    assert actual["gradient of u_BLD"].dtype == torch.bfloat16
    of_u = {k: x.pop("gradient of u_BLD") for k, x in (("actual", actual), ("expected", expected))}
    assert_near(actual, expected)
    assert_near({"u": of_u["actual"]}, {"u": of_u["expected"]}, 4e-3)


def test_powers_are_those_of_float64() -> None:
    a = torch.exp(torch.complex(-torch.rand(300) * 1e-3, torch.randn(300))).to(DEVICE)
    for n in (2, 129, 4096):
        power = torch.view_as_complex(kernels.powers(torch.view_as_real(a), n))
        expected = a.to(torch.complex128) ** n
        assert ((power - expected).abs() <= 2e-7 * expected.abs()).all()


def test_time_is_cut_where_programs_are_few() -> None:
    def plan(batch: int, length: int, width: int, pairs: int = 32) -> Any:
        return kernels.cut_time(torch.empty(batch, length, width, device="meta"), pairs)

    assert plan(8, 65_536, 512).grid == (512, 1)
    assert plan(8, 65_536, 256).spans > 1
    few = plan(1, 65_536, 64)
    assert few.grid[0] == 8
    assert few.spans == 128  # a span of 512 positions, and 128 ends to go through: not the 132 that are wanted
    assert few.span % kernels.TILE == 0
    assert plan(1, 7, 4).spans == 1


@pytest.mark.usefixtures("_spans")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_sum_that_overflowed_is_forgotten_at_a_reset() -> None:
    given, reset = inputs(1, 37, 2, 3), torch.zeros(1, 37, dtype=torch.bool, device=DEVICE)
    given["h_init"][:] = torch.inf
    reset[0, 5] = True
    y, last = cast("Op", siso_ssm)(**given, reset=reset)
    assert y[:, 5:].isfinite().all()
    assert last.isfinite().all()


def test_a_suffix_does_not_touch_the_prefix() -> None:
    given, op = inputs(1, 20, 3, 2), cast("Op", siso_ssm)
    before, _ = op(**given)
    given["u_BLD"] = torch.cat([given["u_BLD"][:, :11], -3 * given["u_BLD"][:, 11:]], 1)
    after, _ = op(**given)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


@pytest.mark.parametrize("kind", [S4D, DSS])
def test_layers_go_on_where_they_ended(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: ChannelSSM = kind(kind.Config(3, d_state=4)).to(DEVICE)
    x, reset = torch.randn(2, 11, 3, device=DEVICE), resets(2, 11)
    calls: list[int] = []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda u, *rest: (calls.append(u.shape[1]), forward(u, *rest))[1])
    with torch.no_grad():
        whole = layer(x, reset=reset)
        head = layer(x[:, :6], reset=reset[:, :6])
        tail = layer(x[:, 6:], head.state, reset=reset[:, 6:])
        with torch.autocast(DEVICE, torch.bfloat16):
            half = layer(x, reset=reset)
        assert calls == [11, 6, 5, 11]
        monkeypatch.setattr(dispatch, "KERNELS", "torch")
        plain = layer(x, reset=reset)
    torch.testing.assert_close(torch.cat([head.y, tail.y], 1), whole.y)
    torch.testing.assert_close(tail.state.h, whole.state.h)
    torch.testing.assert_close(whole.y, plain.y)
    torch.testing.assert_close(half.y.float(), plain.y, rtol=0.05, atol=0.05)
    assert half.state.h.dtype == torch.float32


@pytest.mark.parametrize("kind", [S4D, DSS])
def test_layers_learn(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: ChannelSSM = kind(kind.Config(3, d_state=4)).to(DEVICE)
    x, reset = torch.randn(2, 7, 3, device=DEVICE), resets(2, 7)
    found: list[tuple[Tensor, ...]] = []
    for path in ("triton", "torch"):
        monkeypatch.setattr(dispatch, "KERNELS", path)
        found.append(torch.autograd.grad(layer(x, reset=reset).y.square().sum(), list(layer.parameters())))
    torch.testing.assert_close(*found)
