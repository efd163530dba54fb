"""What numba kernels are built from: the exponential, threads over rows, and who picks them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recollect.ops import dispatch
from recollect.ops.kernels.compiled import arrays, exp, kernel, over_rows


@kernel
def _exponentials(begin, end, x, y):
    for row in range(begin, end):
        source, target = x[row], y[row]
        for i in range(source.shape[0]):
            target[i] = exp(source[i])


@pytest.mark.parametrize(("dtype", "low", "high"), [(np.float32, -87, 88), (np.float64, -708, 709)])
def test_the_exponential_is_exact_to_a_unit_in_the_last_place(dtype: type, low: float, high: float) -> None:
    g = np.random.default_rng(0)
    x = np.concatenate([g.uniform(low, high, 50_000), g.uniform(-1, 1, 50_000)]).astype(dtype)[None]
    y = np.empty_like(x)
    _exponentials(0, 1, x, y)
    wanted = np.exp(x.astype(np.longdouble))
    assert np.max(np.abs(y - wanted) / np.spacing(wanted.astype(dtype))) < 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_exponential_at_its_ends(dtype: type) -> None:
    x = np.array([[0, -np.inf, np.inf, -1e4, 1e4, np.nan]], dtype)
    y = np.empty_like(x)
    _exponentials(0, 1, x, y)
    np.testing.assert_array_equal(y, np.array([[1, 0, np.inf, 0, np.inf, np.nan]], dtype))


@pytest.mark.parametrize("n_rows", [0, 1, 2, 5, 64])
def test_every_row_is_run_once_whatever_the_number_of_threads(n_rows: int) -> None:
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            seen = np.zeros(n_rows, int)

            def run(begin: int, end: int, seen: np.ndarray = seen) -> None:
                seen[begin:end] += 1

            over_rows(n_rows, run)
            assert (seen == 1).all()
    finally:
        torch.set_num_threads(threads)


def test_arrays_are_contiguous_and_share_memory_where_they_can() -> None:
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    same, turned = arrays(x, x.T)
    same[0, 0] = 7
    assert x[0, 0] == 7
    assert turned.flags["C_CONTIGUOUS"]


def test_kernels_run_on_a_cpu_in_single_and_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2)
    assert dispatch.explain_kernels(x, x.double()).path == "numba"
    assert dispatch.kernels("compiled", x) is not None
    assert "float16" in dispatch.explain_kernels(x.half()).why
    assert "meta" in dispatch.explain_kernels(x.to("meta")).why
    monkeypatch.setattr(dispatch, "KERNELS", "torch")
    assert dispatch.kernels("compiled", x) is None
