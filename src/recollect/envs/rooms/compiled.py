"""How the loops of these environments are compiled, and spread over threads.

Without fast-math: a frame, and where an agent goes, are the same numbers whatever they are computed beside. Compiled
code is kept on disk beside this file or in ``NUMBA_CACHE_DIR``; numba watches only the file a function is written in.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

F = TypeVar("F", bound=Callable[..., Any])

Array = np.ndarray[Any, Any]


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def compiled(function: F) -> F:
    """Compile ``function`` at its first call, without the GIL."""
    try:
        return cast(F, numba.njit(cache=True, **_OPTIONS)(function))
    except RuntimeError:  # no folder to keep compiled code in
        return cast(F, numba.njit(**_OPTIONS)(function))


def inner(function: F) -> F:
    """A function that only compiled ones call: it is kept with them, and not made callable from Python."""
    options: dict[str, Any] = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast(F, numba.njit(**options)(function))


def plain(array: npt.ArrayLike, dtype: npt.DTypeLike) -> Array:
    """The array as compiled code knows it, so that it is compiled once: contiguous and writable. Copies if it must."""
    return np.require(array, dtype, ["C", "W"])


def over_rows(n_rows: int, threads: int, run: Callable[[int, int], None]) -> None:
    """``run(begin, end)`` over 0..n_rows in as many parts as there are threads. ``run`` must release the GIL."""
    parts = max(1, min(threads, n_rows))
    if parts == 1:
        run(0, n_rows)
        return
    edges = [n_rows * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        for each in [pool.submit(run, begin, end) for begin, end in pairwise(edges)]:
            each.result()
