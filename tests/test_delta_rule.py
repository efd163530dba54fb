"""The gated delta rule: both executions against the reference, what it stores, and how long it stays accurate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.core.errors import ConfigError
from recollect.layers.gated_deltanet import GatedDeltaNet
from recollect.ops import dispatch
from recollect.ops.delta_rule import delta_rule, delta_rule_reference, delta_rule_step

LENGTHS = (1, 63, 64, 65, 1000)
PATHS = ("auto", "torch")
# Largest error over largest value (at least 1), float32 against the float64 reference at 1,000 positions.
FLOAT32_TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def inputs(length: int, *, d_state: int = 5, width: int = 3, batch: int = 2, heads: int = 2) -> dict[str, Tensor]:
    """Everything ``delta_rule`` takes; decays from 1 down to underflow, beta up to 2 (negative eigenvalues)."""
    reset = torch.rand(batch, length) < 0.03
    reset[0, :2] = True
    reset[1, length // 2 :][:2] = True
    log_alpha = -F.softplus(torch.randn(batch, length, heads, dtype=torch.float64) - 2)
    log_alpha[:, length // 3] = -800
    log_alpha[:, length // 4] = 0
    return {
        "q_BLHN": torch.randn(batch, length, heads, d_state, dtype=torch.float64),
        "k_BLHN": F.normalize(torch.randn(batch, length, heads, d_state, dtype=torch.float64), dim=-1),
        "v_BLHP": torch.randn(batch, length, heads, width, dtype=torch.float64),
        "log_alpha_BLH": log_alpha,
        "beta_BLH": 2 * torch.sigmoid(2 * torch.randn(batch, length, heads, dtype=torch.float64)),
        "h_init": torch.randn(batch, heads, width, d_state, dtype=torch.float64),
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


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_both_paths_equal_the_reference(length: int, delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(length)
    without_reset = {k: v for k, v in given.items() if k != "reset"}
    from_zero = {k: v for k, v in given.items() if k != "h_init"}
    for case in (given, without_reset, from_zero) if length < 1000 else (given,):
        expected = run(delta_rule_reference, case, delta=delta)
        for path in PATHS:
            monkeypatch.setattr(dispatch, "KERNELS", path)
            assert_near(run(delta_rule, case, delta=delta), expected, 1e-9)
        if length < 1000:
            assert_near(run(delta_rule, case, delta=delta, chunk_size=7), expected, 1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("d_state", "width"), [(16, 16), (33, 20), (16, 40)])
def test_widths_beyond_one_vector(d_state: int, width: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = inputs(40, d_state=d_state, width=width)
    assert_near(run(delta_rule, given), run(delta_rule_reference, given), 1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_any_layout_in_memory(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs whose axes are permuted in memory, and a memory handed back as it came out."""
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = inputs(40, d_state=16, width=16)
    turned = {k: v.transpose(0, 1).contiguous().transpose(0, 1) for k, v in given.items()}
    turned["h_init"] = given["h_init"].mT.contiguous().mT

    before = {k: v.clone() for k, v in turned.items()}
    assert_near(run(delta_rule, turned), run(delta_rule_reference, given), 1e-9)
    assert all(torch.equal(turned[k], before[k]) for k in turned)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("resets", [True, False])
def test_single_precision(resets: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = inputs(1000, d_state=32, width=32)
    if not resets:
        del given["reset"]
    single = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    actual = run(delta_rule, single)
    assert actual["output 0"].dtype == torch.float32
    assert_near(actual, run(delta_rule_reference, given), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_summed_in_single(autocast: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", path)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(65).items()}
    expected, _ = delta_rule_reference(**half)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, memory = delta_rule(**half)
    assert (y.dtype, memory.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("path", "fill"), [("auto", -1e4), ("torch", -1e4), ("auto", -torch.inf)])
def test_complete_forgetting_stays_finite(fill: float, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(g_q - g_s) would overflow for s > q; neither values nor gradients may see it."""
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(64).items()}
    given["log_alpha_BLH"] = torch.full_like(given["log_alpha_BLH"], fill)
    for reset in (given["reset"], None):
        found = run(delta_rule, {k: v for k, v in given.items() if k != "reset"}, reset=reset)
        assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("length", [20, 70])
def test_nothing_reaches_back_in_time_or_across_a_reset(
    length: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = inputs(length)
    given["reset"] = torch.zeros(2, length, dtype=torch.bool)
    given["reset"][:, 5] = True
    varied = ("k_BLHN", "v_BLHP", "log_alpha_BLH", "beta_BLH")
    leaves = {k: given[k].clone().requires_grad_() for k in varied}
    y, _ = delta_rule(**(given | leaves), chunk_size=16)
    grads = torch.autograd.grad(y[:, 12].sum(), list(leaves.values()))
    for name, grad in zip(varied, grads, strict=True):
        assert (grad[:, 13:] == 0).all(), name
        assert grad[:, :5].abs().max() < 1e-12, name
    changed = {k: torch.cat([given[k][:, :13], given[k][:, 13:] / 2], 1) for k in varied}
    assert torch.equal(delta_rule(**(given | changed), chunk_size=16)[0][:, :13], y[:, :13])


@pytest.mark.parametrize("path", PATHS)
def test_threads_give_the_same_bits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", path)
    given = inputs(65)
    one = run(delta_rule, given)
    torch.set_num_threads(2)
    try:
        two = run(delta_rule, given)
    finally:
        torch.set_num_threads(1)
    assert path == "torch" or all(torch.equal(one[name], two[name]) for name in one)
    assert_near(two, one, 1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_orthonormal_keys_store_values_exactly_and_a_key_written_again_is_replaced(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without decay and with beta = 1 the memory is a table: no outside formula is needed to know its answers."""
    monkeypatch.setattr(dispatch, "KERNELS", path)
    keys_NN = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    order = torch.randint(0, 16, (200,))
    values_LP = torch.randn(200, 6, dtype=torch.float64)
    asked = torch.randint(0, 16, (200,))
    table = torch.zeros(16, 6, dtype=torch.float64)
    expected = []
    for key, value, ask in zip(order, values_LP, asked, strict=True):
        table[key] = value
        expected.append(table[ask].clone())
    still, whole = torch.zeros(1, 200, 1, dtype=torch.float64), torch.ones(1, 200, 1, dtype=torch.float64)
    y, memory = delta_rule(
        keys_NN[asked][None, :, None], keys_NN[order][None, :, None], values_LP[None, :, None], still, whole
    )
    torch.testing.assert_close(y[0, :, 0], torch.stack(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close((memory[0, 0] @ keys_NN.T).T, table, rtol=0, atol=1e-12)


def test_a_step_is_the_equation_of_the_paper() -> None:
    given = inputs(1)
    q, k, v, log_alpha, beta = (
        given[name][:, 0] for name in ("q_BLHN", "k_BLHN", "v_BLHP", "log_alpha_BLH", "beta_BLH")
    )
    log_alpha = log_alpha - 0.3
    y, memory = delta_rule_step(q, k, v, log_alpha, beta, given["h_init"])
    for row in range(2):
        for head in range(2):
            key, b = k[row, head], beta[row, head]
            erased = given["h_init"][row, head] @ (torch.eye(5, dtype=torch.float64) - b * torch.outer(key, key))
            expected = torch.exp(log_alpha[row, head]) * erased + b * torch.outer(v[row, head], key)
            torch.testing.assert_close(memory[row, head], expected)
            torch.testing.assert_close(y[row, head], expected @ q[row, head])


def test_negative_eigenvalues_flip_what_a_key_holds() -> None:
    """With beta = 2 writing a zero value negates the stored one; with beta = 1 it would erase it."""
    key, value = F.normalize(torch.randn(5, dtype=torch.float64), dim=0), torch.randn(3, dtype=torch.float64)
    memory = torch.outer(value, key)[None, None]
    zero, two = torch.zeros(1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1), 2.0, dtype=torch.float64)
    y, _ = delta_rule(
        key[None, None, None], key[None, None, None], 0 * value[None, None, None], zero, two, h_init=memory
    )
    torch.testing.assert_close(y[0, 0, 0], -value)


@pytest.mark.parametrize("name", ["n_heads", "d_head", "d_value", "chunk_size"])
def test_sizes_of_nothing_are_one_line_errors(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^gated_deltanet: {name} must be at least 1, got 0$"):
        GatedDeltaNet.Config(8, **{name: 0})


def test_impossible_options_are_one_line_errors() -> None:
    with pytest.raises(ConfigError, match=r"^gated_deltanet: d_conv must be 0 \(no convolution\) or more, got -2$"):
        GatedDeltaNet.Config(8, d_conv=-2)
    with pytest.raises(ConfigError, match=r"^gated_deltanet: need 0 < dt_min <= dt_max, got .*$"):
        GatedDeltaNet.Config(8, dt_min=0.5, dt_max=0.1)


def test_keys_have_unit_length_and_decays_stay_below_one() -> None:
    layer = GatedDeltaNet(GatedDeltaNet.Config(8, n_heads=2, d_head=4, d_value=6, allow_negative_eigenvalues=True))
    qkv, _, log_alpha, beta = layer._project(torch.randn(2, 30, 8))
    q, k, v, u = layer._split(qkv)
    for part in (q, k):
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(2, 30, 2), rtol=1e-3, atol=1e-3)
    assert log_alpha.max() < 0
    assert (beta.max() < 2) & (beta.max() > 1)
    assert torch.equal(v.flatten(-2), u)
