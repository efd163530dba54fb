"""The diagonal recurrence: fast against reference in values and gradients, and the algebra of its operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recollect.ops import dispatch
from recollect.ops.scan import combine, elements, scan, scan_reference

BATCH, WIDTH = 2, 3
LENGTHS = (1, 63, 64, 65, 1000)
# Largest error over largest value (at least 1), float32 against the float64 reference at 1,000 positions: measured
# 7e-7 and below.
FLOAT32_TOLERANCE = 3e-6

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def inputs(length: int, *, constant: bool, dtype: torch.dtype = torch.complex128) -> dict[str, Tensor]:
    """A decay of modulus 0.5 to 1, drive, initial state, resets (first position and neighbours too), reset state."""
    decay = torch.rand(*(() if constant else (BATCH, length)), WIDTH, dtype=torch.float64) * 0.5 + 0.5
    if dtype.is_complex:
        decay = decay * torch.exp(1j * torch.randn_like(decay))
    reset = torch.rand(BATCH, length) < 0.05
    reset[0, :2] = True
    reset[1, length // 2 :][:2] = True
    return {
        "a": decay.to(dtype),
        "b": torch.randn(BATCH, length, WIDTH, dtype=dtype),
        "h_init": torch.randn(BATCH, WIDTH, dtype=dtype),
        "reset": reset,
        "h_reset": torch.randn(WIDTH, dtype=dtype),
    }


def run(op: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Tensor], **options: int | None) -> dict[str, Tensor]:
    """States, last state, and gradients of a random function of both by every differentiable input."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if v.dtype != torch.bool}
    h, last = op(
        leaves["a"], leaves["b"], **{k: leaves.get(k, v) for k, v in given.items() if k not in "ab"}, **options
    )
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(h.shape, generator=generator, dtype=torch.float64)
    loss = (h * weight).sum() + (last * last).sum()
    loss = loss.abs() if loss.is_complex() else loss
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"h": h, "last": last} | {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() / value.abs().max().clamp_min(1)
        assert error <= tolerance, f"{name}: relative error {error}"


@pytest.mark.parametrize(("kernels", "chunk_size"), [("auto", None), ("torch", None), ("torch", 8), ("torch", 64)])
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "varying"])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_equals_reference(
    length: int, constant: bool, kernels: str, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    for dtype in (torch.float64, torch.complex128):
        given = inputs(length, constant=constant, dtype=dtype)
        without = {k: v for k, v in given.items() if k in ("a", "b", "h_init")}
        for case in (
            given,
            without,
            {k: given[k] for k in "ab"},
            given | {"h_reset": torch.randn_like(given["h_init"])},
        ):
            assert_near(run(scan, case, chunk_size=chunk_size), run(scan_reference, case), 1e-9)


@pytest.mark.parametrize("chunk_size", [None, 32])
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "varying"])
def test_scan_in_single_precision(constant: bool, chunk_size: int | None) -> None:
    given = inputs(1000, constant=constant)
    single = {k: v if v.dtype == torch.bool else v.to(torch.complex64) for k, v in given.items()}
    assert_near(run(scan, single, chunk_size=chunk_size), run(scan_reference, given), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_number_of_threads_gives_the_same_bits(batch: int, dtype: torch.dtype) -> None:
    """One row is split into blocks of channels: 37 are two vectors and a rest."""
    a, h_init = 0.9 * torch.rand(37).to(dtype), torch.randn(batch, 37, dtype=dtype)
    b, reset = torch.randn(batch, 50, 37, dtype=dtype), torch.rand(batch, 50) < 0.1
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(scan, {"a": a, "b": b, "h_init": h_init, "reset": reset}))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], value) for name, value in other.items())


def test_half_precision_is_summed_in_single() -> None:
    given = inputs(65, constant=True, dtype=torch.float64)
    h, last = scan(given["a"].bfloat16(), given["b"].bfloat16(), given["h_init"].bfloat16())
    assert (h.dtype, last.dtype) == (torch.float32, torch.float32)


def test_reset_acts_before_the_position_is_consumed() -> None:
    a, b, h_reset = torch.tensor([0.5]), torch.tensor([[[1.0], [1.0], [1.0]]]), torch.tensor([10.0])
    h, _ = scan(a, b, torch.tensor([[4.0]]), reset=torch.tensor([[False, True, False]]), h_reset=h_reset)
    assert h.flatten().tolist() == [3.0, 6.0, 4.0]


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_nothing_reaches_back_in_time_or_across_a_reset(chunk_size: int | None) -> None:
    given = inputs(40, constant=False)
    given["reset"] = torch.zeros(BATCH, 40, dtype=torch.bool)
    given["reset"][:, 11] = True
    b = given.pop("b").requires_grad_()
    (grad,) = torch.autograd.grad(scan(b=b, chunk_size=chunk_size, **given)[0][:, 20].abs().sum(), b)
    assert (grad[:, :11] == 0).all()
    assert (grad[:, 11:21] != 0).all()
    assert (grad[:, 21:] == 0).all()
    changed = b.detach().clone()
    changed[:, 21:] += 1
    before, after = (scan(b=values, chunk_size=chunk_size, **given)[0] for values in (b, changed))
    assert torch.equal(before[:, :21], after[:, :21])


numbers = st.complex_numbers(max_magnitude=2, allow_nan=False, allow_infinity=False)
positions = st.tuples(numbers, numbers, st.booleans())


@settings(deadline=None, max_examples=200)
@given(st.lists(positions, min_size=1, max_size=9), numbers, numbers, st.data())
def test_any_bracketing_equals_the_equation_with_resets_to_learned_states(
    sequence: list[tuple[complex, complex, bool]], h_reset: complex, h: complex, data: st.DataObject
) -> None:
    """A parallel scan may bracket as it likes; every position may be reset, to a state of its row's own."""
    length = len(sequence)
    a = torch.tensor([[[a] for a, _, _ in sequence]], dtype=torch.complex128)
    b = torch.tensor([[[b] for _, b, _ in sequence]], dtype=torch.complex128)
    reset = torch.tensor([[r for _, _, r in sequence]])
    fresh, start = (torch.tensor([[value]], dtype=torch.complex128) for value in (h_reset, h))
    a_all, b_all = elements(a, b, reset, fresh)
    parts = list(zip(a_all.unbind(1), b_all.unbind(1), strict=True))
    while len(parts) > 1:
        at = data.draw(st.integers(0, len(parts) - 2))
        parts[at : at + 2] = [combine(parts[at], parts[at + 1])]
    _, expected = scan_reference(a, b, start, reset=reset, h_reset=fresh)
    _, compiled = scan(a, b, start, reset=reset, h_reset=fresh)
    bound = 1e-12 * 4.0**length
    torch.testing.assert_close(parts[0][0] * start + parts[0][1], expected, rtol=1e-12, atol=bound)
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=bound)


@settings(deadline=None, max_examples=200)
@given(st.tuples(positions, positions, positions), numbers, numbers)
def test_combine_is_associative_with_resets(
    three: tuple[tuple[complex, complex, bool], ...], h_reset: complex, h: complex
) -> None:
    """In the algebra, and in what it means: applied to a state, the product equals the equation with its resets."""
    a = torch.tensor([[[a] for a, _, _ in three]], dtype=torch.complex128)
    b = torch.tensor([[[b] for _, b, _ in three]], dtype=torch.complex128)
    reset = torch.tensor([[r for _, _, r in three]])
    fresh, start = (torch.tensor([value], dtype=torch.complex128) for value in (h_reset, h))
    a_all, b_all = elements(a, b, reset, fresh)
    x, y, z = zip(a_all.unbind(1), b_all.unbind(1), strict=True)
    left, right = combine(combine(x, y), z), combine(x, combine(y, z))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    _, expected = scan_reference(a, b, start.unsqueeze(0), reset=reset, h_reset=fresh)
    torch.testing.assert_close(left[0] * start + left[1], expected, rtol=1e-12, atol=1e-12)
