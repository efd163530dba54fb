"""What b bits of state can know of a table: bounds for any model that reads the table first and is asked afterwards.

A table is n independent, uniform values out of V (joint recall: n = contexts x keys). Whatever a model does, its
answers are a function of the state that it carries into the questions, so a state of b bits allows 2^b sets of answers.

* The whole table is right with probability at most 2^b / V^n (arXiv 2507.00449, corollary 3.1).
* The expected share of right cells is at most 1 - D, where n R(D) = b and R(D) = log2 V - h(D) - D log2(V - 1), the
  rate-distortion function of a uniform source under Hamming distortion (Cover and Thomas, Elements of Information
  Theory, theorem 10.3.1 and problem 10.5). The converse half of that theorem holds for every n, not only in the limit.

Both hold for one query per cell, for any order of asking, and for randomised models too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError

Floats = npt.NDArray[np.float64]


def table_bits(n_cells: int, n_values: int) -> float:
    """n log2 V, the bits of a table: with fewer no model is always right."""
    _check(n_cells, n_values)
    return float(n_cells * np.log2(n_values))


def whole_table_bound(bits: npt.ArrayLike, n_cells: int, n_values: int) -> Floats:
    """The largest probability min(1, 2^b / V^n) of answering every cell of a table right, for each of ``bits``."""
    missing = _bits(bits) - table_bits(n_cells, n_values)
    return np.exp2(np.minimum(missing, 0.0))


def rate(error: npt.ArrayLike, n_values: int) -> Floats:
    """Bits per cell that are needed for a share of wrong cells ``error`` in [0, 1]; 0 from 1 - 1/V on."""
    _check(1, n_values)
    wrong = np.asarray(error, dtype=np.float64)
    if ((wrong < 0) | (wrong > 1)).any():
        raise ConfigError("a share of wrong cells is in [0, 1]")
    wrong = np.minimum(wrong, 1 - 1 / n_values)
    # x log2 x is 0 at 0.
    entropy = -sum(part * np.log2(np.where(part > 0, part, 1.0)) for part in (wrong, 1 - wrong))
    return np.maximum(np.log2(n_values) - entropy - wrong * np.log2(max(n_values - 1, 1)), 0.0)


def accuracy_bound(bits: npt.ArrayLike, n_cells: int, n_values: int) -> Floats:
    """The largest expected share of right cells with each of ``bits`` bits of state: 1/V at 0 bits, 1 from
    ``table_bits`` on. Solved by bisection to double precision.
    """
    per_cell = _bits(bits) / n_cells
    _check(n_cells, n_values)
    low, high = np.zeros_like(per_cell), np.full_like(per_cell, 1 - 1 / n_values)
    for _ in range(60):  # rate falls from log2 V at 0 to 0 at 1 - 1/V
        middle = (low + high) / 2
        enough = rate(middle, n_values) <= per_cell
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(per_cell >= np.log2(n_values), 1.0, 1 - low)


def _bits(bits: npt.ArrayLike) -> Floats:
    array = np.asarray(bits, dtype=np.float64)
    if (array < 0).any():
        raise ConfigError("a state has at least 0 bits")
    return array


def _check(n_cells: int, n_values: int) -> None:
    if n_cells < 1 or n_values < 1:
        raise ConfigError(f"a table has at least one cell and one value, got {n_cells} cells of {n_values} values")
