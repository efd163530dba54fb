"""The mLSTM: both executions against the reference, the closed form it stands for, and how long it stays accurate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig
from recollect.layers.mlstm import MLSTM
from recollect.ops import dispatch
from recollect.ops.mlstm import MatrixMemory, mlstm, mlstm_reference

LENGTHS = (1, 63, 64, 65, 1000)
PATHS = ("auto", "torch")
FLOAT32_TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def inputs(length: int, *, d_state: int = 5, width: int = 3, batch: int = 2, heads: int = 2) -> dict[str, Tensor]:
    """Everything ``mlstm`` takes; gates from nearly open to nearly shut, so that every branch of m and y is taken."""

    def random(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64)

    reset = torch.rand(batch, length) < 0.03
    reset[0, :2] = True
    reset[1, length // 2 :][:2] = True
    f = 2 * random(batch, length, heads) + 2
    f[:, length // 3] = -300
    i = 3 * random(batch, length, heads)
    i[:, length // 4] = 60
    return {
        "q_BLHN": random(batch, length, heads, d_state),
        "k_BLHN": random(batch, length, heads, d_state),
        "v_BLHP": random(batch, length, heads, width),
        "i_BLH": i,
        "f_BLH": f,
        "C": random(batch, heads, width, d_state),
        "n": random(batch, heads, d_state),
        "m": random(batch, heads),
        "reset": reset,
    }


def run(op: Callable[..., Any], given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of a random function of all of them (m included) by every differentiable input."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if v.is_floating_point()}
    given = {k: leaves.get(k, v) for k, v in given.items()}
    memory = MatrixMemory(*(given.pop(name) for name in "Cnm")) if "C" in given else None
    y, last = op(**given, memory=memory, **options)
    outs = {"y": y, "C": last.C, "n": last.n, "m": last.m}
    generator = torch.Generator().manual_seed(3)
    loss = sum((out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum() for out in outs.values())
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return outs | {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() / value.abs().max().clamp_min(1)
        assert error <= tolerance, f"{name}: relative error {error}"


def without(given: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {k: v for k, v in given.items() if k not in names}


@pytest.mark.parametrize("length", LENGTHS)
def test_both_paths_equal_the_reference(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(length)
    cases = (given, without(given, "reset"), without(given, "C", "n", "m"))
    for case in cases if length < 1000 else (given,):
        expected = run(mlstm_reference, case)
        for path in PATHS:
            monkeypatch.setattr(dispatch, "KERNELS", path)
            assert_near(run(mlstm, case), expected, 1e-9)
        if length < 1000:
            assert_near(run(mlstm, case, chunk_size=7), expected, 1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_single_precision(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets a thousand times over: m runs down to about -700, where its own rounding must cancel out of y."""
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = without(inputs(1000, d_state=32, width=32), "reset")
    given["i_BLH"] = given["i_BLH"] - 0.7 * torch.arange(1000, dtype=torch.float64)[:, None]
    given["f_BLH"] = torch.zeros_like(given["f_BLH"])
    single = {k: v.float() for k, v in given.items()}
    y, _ = mlstm(**without(single, "C", "n", "m"))
    expected, _ = mlstm_reference(**without({k: v.double() for k, v in single.items()}, "C", "n", "m"))
    assert y.dtype == torch.float32
    assert expected[:, -10:].abs().max() < 1e-30
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_in_single_precision(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = inputs(300)
    given["i_BLH"] = given["i_BLH"].clamp(-3, 3)
    single = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in single.items()}
    assert_near(run(mlstm, single), run(mlstm_reference, exact), 1e-3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_summed_in_single(autocast: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = without(inputs(65), "C", "n", "m")
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    expected, _ = mlstm_reference(**half)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, memory = mlstm(**half)
    assert (y.dtype, memory.C.dtype, memory.m.dtype) == (torch.float32, torch.float32, torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("early", "late", "f"),
    [(200.0, 200.0, 0.0), (200.0, -200.0, 0.0), (-200.0, -200.0, -200.0), (0.0, 0.0, -1e4), (0.0, 0.0, 1e4)],
)
def test_extreme_gates_stay_finite(
    early: float, late: float, f: float, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With input gates that fall at a reset, m falls by more than exp can take."""
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(130).items()}
    given |= {"i_BLH": torch.full_like(given["i_BLH"], late), "f_BLH": torch.full_like(given["f_BLH"], f)}
    given["i_BLH"][:, :65] = early
    given["q_BLHN"][:, 7] = 0
    for case in (given, without(given, "reset")):
        assert all(value.isfinite().all() for value in run(mlstm, case).values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gated", [False, True])
def test_it_is_normalised_linear_attention(gated: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the definition without a stabiliser: one matrix of weights, product of forget gates times input gate."""
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = without(inputs(50), "C", "n", "m", "reset")
    i, f = given["i_BLH"].clamp(-4, 4), given["f_BLH"].clamp(-4, 4)
    if not gated:
        i, f = torch.zeros_like(i), torch.full_like(f, 60.0)
    kept_BHL = torch.sigmoid(f).transpose(1, 2)
    factors_BHLS = torch.zeros(2, 2, 50, 50, dtype=torch.float64)
    for t in range(50):
        for s in range(t + 1):
            factors_BHLS[:, :, t, s] = kept_BHL[:, :, s + 1 : t + 1].prod(-1)
    scores = torch.einsum("blhn,bshn->bhls", given["q_BLHN"], given["k_BLHN"]) / 5**0.5
    weights = scores * factors_BHLS * torch.exp(i).transpose(1, 2).unsqueeze(2)
    expected = (weights @ given["v_BLHP"].transpose(1, 2)) / weights.sum(-1, keepdim=True).abs().clamp_min(1)
    y, _ = mlstm(**(given | {"i_BLH": i, "f_BLH": f}))
    torch.testing.assert_close(y.transpose(1, 2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_outputs_do_not_depend_on_where_m_starts(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = without(inputs(70), "reset")
    memory = MatrixMemory(*(given.pop(name) for name in "Cnm"))
    shifted = MatrixMemory(memory.C * torch.e**4, memory.n * torch.e**4, memory.m - 4)
    torch.testing.assert_close(mlstm(**given, memory=memory)[0], mlstm(**given, memory=shifted)[0], rtol=0, atol=1e-10)


def test_gates_start_as_declared() -> None:
    layer = MLSTM(MLSTM.Config(8))
    input_bias, forget_bias = layer.gates.bias.detach().view(2, -1)
    assert input_bias.abs().max() < 1
    torch.testing.assert_close(forget_bias, torch.linspace(3, 6, 4))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"d_conv": -1}, "d_conv must be 0 (no convolution) or more, got -1"),
        ({"n_heads": 3}, "16 is not divisible by n_heads 3"),
        ({"qkv_block": 5}, "16 is not divisible by qkv_block 5"),
        ({"expand": 0}, "expand must be at least 1"),
    ],
)
def test_impossible_sizes_are_one_line_errors(options: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        MLSTM.Config(8, **options)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_states_have_the_declared_size() -> None:
    config: LayerConfig = MLSTM.Config(8)
    assert config.state_bytes(2) == 2 * 4 * (3 * 16 + 16 * (4 + 1) + 4)
